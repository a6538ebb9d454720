"""Where the prompt ends in calls that others make: said around them, told by labels, or warned of."""

import warnings
from typing import Any

import pytest
import torch
from families import fresh
from test_reft_data import make_tokenizer
from test_reft_trainer import answers, collate, decoder
from torch import Tensor

from subspace_lab.reft import ReftConfig, ReftModel, get_reft_model
from subspace_lab.reft.harness import with_prompts

PAIRS = [
    ([5, 6, 7], [8, 9]),
    ([5, 6], [7, 8, 9]),
    ([20, 21, 22, 23], [24]),
    ([20, 21, 22, 23], [0]),
    ([9], [4, 0, 0]),
]


def score(model: ReftModel, prompt: list[int], answer: list[int]) -> float:
    """The answer's log-probability, by its labels."""
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        return -float(model(input_ids=ids, labels=labels).loss) * len(answer)


class Harness:
    """What HFLM does to score answers: right padding by zeros, no mask, no labels, one call for equal inputs."""

    def __init__(
        self, model: ReftModel, batch_size: int = 3, max_length: int = 64, backend: str = "causal"
    ) -> None:
        self.model, self.batch_size, self.max_length, self.backend = model, batch_size, max_length, backend

    def _model_call(self, ids: Tensor) -> Any:
        with torch.no_grad():
            return self.model(ids).logits

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = []
        self._model_call(torch.ones(2, self.max_length, dtype=torch.long))  # as it looks for a batch size
        for start in range(0, len(requests), self.batch_size):
            chunk = requests[start : start + self.batch_size]
            inputs = [torch.tensor([*p, *a][-(self.max_length + 1) :][:-1]) for _, p, a in chunk]
            ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
            for (_, _, answer), row, n in zip(
                chunk, self._model_call(ids).log_softmax(-1), map(len, inputs), strict=True
            ):
                steps = row[n - len(answer) : n]
                found.append((float(steps[range(len(answer)), answer].sum()), True))
        return found


def requests(pairs: list[tuple[list[int], list[int]]] = PAIRS) -> list[Any]:
    return [(("", ""), prompt, answer) for prompt, answer in pairs]


@pytest.mark.parametrize("positions", ["l1", "f1+l2", "all"])
def test_a_harness_scores_answers_as_their_labels_do(positions: str) -> None:
    """Also where one call's tokens are prompt in one request and answer in another, and where zeros are tokens."""
    model = decoder(positions, start="paper").eval()
    expected = [score(model, *pair) for pair in PAIRS]
    lm = with_prompts(Harness(model))
    found = [s for s, _ in lm._loglikelihood_tokens(requests(), disable_tqdm=True)]
    assert found == pytest.approx(expected, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = [s for s, _ in Harness(model)._loglikelihood_tokens(requests())]
    assert max(abs(a - b) for a, b in zip(plain, expected, strict=True)) > 1e-2


def test_a_harness_cuts_long_prompts_from_the_left() -> None:
    model = decoder("l1", start="paper").eval()
    prompt, answer = list(range(3, 30)), [31, 32]
    lm = with_prompts(Harness(model, max_length=10))
    assert lm._loglikelihood_tokens(requests([(prompt, answer)]))[0][0] == pytest.approx(
        score(model, prompt[-9:], answer), abs=1e-4
    )


def test_what_is_no_harness_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lm\.model"):
        with_prompts(Harness(fresh("llama")))
    seq2seq = Harness(decoder(), backend="seq2seq")
    assert with_prompts(seq2seq)._loglikelihood_tokens.__func__ is Harness._loglikelihood_tokens


def test_the_harness_itself() -> None:
    """With lm_eval where it is installed: rankings are those of training."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model = decoder("l1", start="paper").eval()
    lm = with_prompts(
        huggingface.HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=2, max_length=32, device="cpu")
    )
    pairs = [("say hi", " yes now"), ("say hi", " no"), ("no now", " please")]
    found = [s for s, _ in lm.loglikelihood([Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)])]
    tokens = [lm._encode_pair(*pair) for pair in pairs]
    assert found == pytest.approx([score(model, *t) for t in tokens], abs=1e-4)


# --- said around calls --------------------------------------------------------------------------------------


def test_lengths_around_calls_are_those_of_the_argument() -> None:
    model, batch = decoder("l2", start="paper").eval(), collate(list(answers(4)))
    labels = batch.pop("labels")
    lengths = (labels == -100).logical_and(batch["attention_mask"].bool()).sum(1)
    with torch.no_grad():
        expected = model(**batch, labels=labels).logits
        fixed = model(**batch, prompt_lengths=torch.full((4,), 2)).logits
        for said in (lengths, lengths.tolist(), lambda ids: lengths, lambda ids: lengths.tolist()):
            with model.prompt_lengths(said):
                assert torch.equal(model(**batch).logits, expected)
            assert torch.equal(model(**batch, prompt_lengths=said).logits, expected)
        with model.prompt_lengths(2):
            assert torch.equal(model(**batch).logits, fixed)
            assert torch.equal(model(**batch, prompt_lengths=2).logits, fixed)
            assert torch.equal(model(**batch, labels=labels).logits, fixed), "labels do not win"
            assert torch.equal(model(**batch, prompt_lengths=lengths).logits, expected), "the argument wins"
            with model.prompt_lengths(lengths):
                assert torch.equal(model(**batch).logits, expected)
            assert torch.equal(model(**batch).logits, fixed)
        whole = model(**batch, prompt_lengths=batch["attention_mask"].sum(1)).logits
        with model.prompt_lengths("all"):
            assert torch.equal(model(**batch).logits, whole)
            embedded: dict[str, Any] = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
            del embedded["input_ids"]
            torch.testing.assert_close(model(**embedded).logits, whole)
            with model.prompt_lengths(1):
                assert torch.equal(model(**batch, prompt_lengths="all").logits, whole), "the argument wins"
        assert not torch.allclose(whole, expected)


def test_lengths_that_do_not_fit_are_refused() -> None:
    model, batch = decoder("l2"), collate(list(answers(4)))
    for said, error, sentence in (
        ([3, 3], ValueError, "given for 2 examples, and the call has 4"),
        (lambda ids: [1], ValueError, "given for 1 examples"),
        ("none", ValueError, "the only possible text is 'all'"),
        (2.5, TypeError, "lengths"),
        (99, ValueError, "Prompt lengths"),
    ):
        with pytest.raises(error, match=sentence), model.prompt_lengths(said):  # type: ignore[arg-type]
            model(**batch)
        with pytest.raises(error, match=sentence):
            model(**batch, prompt_lengths=said)
    try:
        with model.prompt_lengths(3):
            raise KeyError("inside")
    except KeyError:
        assert model._outer_lengths is None


def test_training_without_labels_inside_the_block() -> None:
    """A loss of one's own, for which Trainer takes the labels away."""
    model, batch = decoder("l1", start="paper").train(), collate(list(answers(4)))
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="Training needs labels or prompt_lengths"):
        model(**batch)
    with model.prompt_lengths((labels == -100).logical_and(batch["attention_mask"].bool()).sum(1)):
        model(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.adapters.parameters())


# --- warned of ----------------------------------------------------------------------------------------------


def heard(model: ReftModel, *, times: int = 2, **given: Any) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(times):
            model(**given)
    return [str(w.message) for w in caught if "taken as prompt" in str(w.message)]


@pytest.mark.parametrize("positions", ["l2", "f1+l1", "last", "-1", "all", ":-1", "1:"])
def test_positions_that_move_with_the_end_are_warned_of_once(positions: str) -> None:
    ids = torch.arange(3, 12)[None]
    said = heard(decoder(positions).eval(), input_ids=ids)
    assert len(said) == 1 and "prompt_lengths" in said[0]


@pytest.mark.parametrize("positions", ["f2", "first", "0", "1:3"])
def test_positions_that_stay_are_not(positions: str) -> None:
    assert not heard(decoder(positions).eval(), input_ids=torch.arange(3, 12)[None])


def test_calls_that_say_where_prompts_end_are_not_warned_of() -> None:
    ids = torch.arange(3, 12)[None]
    model = decoder("l2").eval()
    assert not heard(model, input_ids=ids, prompt_lengths=torch.tensor([4]))
    assert not heard(model, input_ids=ids, labels=ids.where(torch.arange(9) > 5, -100))
    with model.prompt_lengths("all"):
        assert not heard(model, input_ids=ids)
    with model.disable_adapter():
        assert not heard(model, input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=2)
    assert len(heard(model, input_ids=ids)) == 1
    encoder = get_reft_model(fresh("bert"), ReftConfig(rank=2, positions="l2")).eval()
    assert not heard(encoder, input_ids=ids)
