"""Answers behind prompts: their tokens on several kinds of tokenizer, which can be told apart, and their logits."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_sweeps import PAIRS, QUICK, SITES, counterfactuals, ids_of, states_by_hook, tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from subspace_lab.core.interventions import full_vector
from subspace_lab.core.sites import Site
from subspace_lab.das.answer_engine import SpelledAnswers, answer_engine
from subspace_lab.das.answered import only_answered, right
from subspace_lab.das.answers import Speller, as_spelled, as_tensor, clashes, distinguishing, serving
from subspace_lab.das.encoding import as_message, encode, from_texts
from subspace_lab.das.methods import DAS, FullVector
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.search import search
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.tasks import load_task

WORDS = "The capital of Peru is Lima . He said yes or no : New York New Jersey Paris Norway Oslo she he 12 15 120"
CORPUS = [WORDS] * 20 + ["x (yes) \"yes\" 'no' yes, no.\nyes"] * 20


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """A GPT-2-style tokenizer: a word takes the space before it along."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """A Llama-style tokenizer: ▁ for spaces, one of them before every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.train_from_iterator(
        [f" {line}".replace(" ", " ▁").split(" ") for line in CORPUS],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False),
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The capital of Peru is", "Lima", "The capital of Peru is Lima"),
        ("The capital of Peru is", " Lima", "The capital of Peru is Lima"),
        ("He said :", "yes", "He said : yes"),
        ("He said ", "yes", "He said yes"),
        ("x (", "yes", "x (yes"),
        ('x "', "yes", 'x "yes'),
        ('x "yes"', "no", 'x "yes" no'),
        ("x yes", ".", "x yes."),
        ("x", "New Jersey", "x New Jersey"),
        ("x", "yes ", "x yes"),
        ("x is", "120", "x is 120"),
    ],
)
def test_an_answer_is_what_the_tokenizer_puts_behind_the_prompt(
    kind: str, prompt: str, answer: str, text: str
) -> None:
    tokenizer = KINDS[kind]()
    ids = Speller(tokenizer)(prompt, answer)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*before, *ids]) == text
    joined = tokenizer(text, add_special_tokens=False)["input_ids"]
    if joined[: len(before)] == before:  # otherwise no model that is given the prompt could write this
        assert list(ids) == joined[len(before) :]
    if kind == "byte level" and not prompt.endswith(" "):
        assert joined[: len(before)] == before


def test_the_marks_of_either_kind_mean_a_space() -> None:
    for kind, mark in (("byte level", "Ġ"), ("sentence piece", "▁")):
        spell = Speller(KINDS[kind]())
        ids = {spell("He said :", answer) for answer in ("yes", " yes", "▁yes", "Ġyes")}
        assert [KINDS[kind]().convert_ids_to_tokens(list(one)) for one in ids] == [[f"{mark}yes"]]


def test_a_word_of_a_script_without_spaces_has_none() -> None:
    spell, plain = Speller(byte_level()), byte_level()
    assert list(spell("日本の首都は", "東京")) == plain("東京")["input_ids"]
    assert list(spell("日本の首都は", "Lima")) == plain(" Lima")["input_ids"]


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="The answer 'Ωmega' cannot be written with this tokenizer"):
        Speller(sentence_piece())("He said", "Ωmega")
    with pytest.raises(ValueError, match="The answer '' cannot be written"):
        Speller(byte_level())("He said", "")


# --- told apart ---------------------------------------------------------------------------------------------


def drawn(seed: int, n: int = 12) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.choices(range(3), k=rng.randint(1, 3))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_told_apart_by_their_shortest_beginnings(seed: int) -> None:
    every = drawn(seed)
    begun = {j for i, one in enumerate(every) for j, two in enumerate(every) if i != j and two[: len(one)] == one}
    found = clashes(every)
    assert all(every[longer][: len(every[one])] == every[one] for one, longer in found)
    first = [one for one in {every.index(one) for one in every} if not any(
        every[one][: len(two)] == two and two != every[one] for two in every)]  # fmt: skip
    assert {longer for _, longer in found} == {j for j in begun if j not in first}
    apart = [every[i] for i in first]
    assert not clashes(apart)
    for one, short in zip(apart, distinguishing(apart), strict=True):
        others = [two for two in apart if two != one]
        assert one[: len(short)] == short and not any(two[: len(short)] == short for two in others)
        assert len(short) == 1 or any(two[: len(short) - 1] == short[:-1] for two in others)


def test_a_table_of_answers_gives_them_back() -> None:
    for spelled in ([(1,), (5,)], [(1, 2), (3,), (4, 0, 6)]):
        assert as_spelled(as_tensor(spelled)) == spelled
    assert as_tensor([(1,), (5,)]).shape == (2,)


def test_an_answer_that_begins_another_is_refused() -> None:
    given: dict[str, Any] = {"base": ["x", "x"], "source": ["x", "x"], "base_answer": ["New", "Paris"]}
    with pytest.raises(ValueError, match="No token tells 'New' from 'New York'"):
        from_texts(byte_level(), **given, answer=["New York", "Paris"])
    made = from_texts(
        byte_level(), **{**given, "base_answer": ["New Jersey", "Paris"]}, answer=["New York", "Paris"]
    )
    assert made.tokens is not None
    assert made.scored is not None
    assert made.tokens.ndim == 2 and made.scored.ndim == 2
    with pytest.raises(ValueError, match="several reads"):
        _ = made.readout


def test_prompts_may_end_in_several_ways() -> None:
    """After a space, the answer is another token than behind a word: both are alternatives, each pair has its own."""
    texts = ["x (", "x"]
    made = from_texts(byte_level(), base=texts, source=texts, answer=["yes", "no"], base_answer=["no", "yes"])
    assert sorted(made.answers) == [" no", " yes", "no", "yes"]
    told = [made.answers[i] for i in (*made.answer, *made.base_answer)]
    assert told == ["yes", " no", "no", " yes"]
    assert made.tokens is not None
    tokens = byte_level().convert_ids_to_tokens(made.tokens[made.answer].tolist())
    assert tokens == ["yes", "Ġno"]


def test_splits_with_other_answers_are_joined_by_all_their_tokens() -> None:
    """New York and New Jersey have the same first token, which alone would make them one answer."""

    def made(answer: str) -> Counterfactuals:
        return from_texts(byte_level(), base=["x"], source=["x"], answer=[answer], base_answer=["Paris"])

    joined = Pairs(made("New York"), made("New Jersey"), made("Oslo"))
    assert joined.test.tokens is not None
    assert isinstance(joined.train, Counterfactuals)
    assert joined.test.answers == joined.train.answers and len(set(as_spelled(joined.test.tokens))) == 4
    told = [split.answers[int(split.answer)] for split in (joined.train, joined.dev, joined.test)]
    assert told == ["New York", "New Jersey", "Oslo"]
    with pytest.raises(ValueError, match="Some splits score their answers whole"):
        Pairs(made("Oslo"), made("Oslo"), replace(made("Oslo"), whole=True))


# --- word lists ---------------------------------------------------------------------------------------------


def test_words_that_cannot_serve_are_left_out() -> None:
    spell = Speller(sentence_piece())
    names = ["Lima", "Paris", "Oslo", "New York", "New Jersey", "yes", "no", "Ωmega", "Peru"]
    kept, left = serving(spell, names, ["x"], "sequence")
    assert list(left) == ["Ωmega"] and [*kept, *left] == [n for n in names if n != "Ωmega"] + ["Ωmega"]
    kept, left = serving(spell, [*names, "New"], ["x"], "sequence")
    assert set(left) == {"Ωmega", "New York", "New Jersey"} and "New" in kept
    with pytest.raises(ValueError, match=r"only \['New'\] can serve"):
        serving(spell, ["New", "New York"], ["x"])
    with pytest.raises(ValueError, match="'Ωmega' cannot be written"):
        serving(spell, ["Lima", "Ωmega"], ["x"])


def test_of_many_words_with_one_first_token_all_stay() -> None:
    """Numbers of several digits: more tokens are read instead."""
    spell = Speller(byte_level())
    digits = [str(n) for n in range(300, 310)]
    assert serving(spell, digits, ["x is"]) == (digits, {})
    few = ["Lima", "Paris", "Oslo", "New York", "New Jersey", "yes", "no", "she"]
    kept, left = serving(spell, few, ["x"])
    assert list(left) == ["New Jersey"] and len(kept) == 7


def test_a_task_leaves_out_the_names_that_its_tokenizer_does_not_know() -> None:
    task = load_task("indirect_object")
    texts = [task.prompt(setting).text for setting in _settings("indirect_object")]
    vocabulary = {word for text in texts for word in text.split()} - {"Paul", "Lucy", "Mark"}
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *sorted(vocabulary)])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    made = task.pairs(tokenizer, train=20, dev=8, test=30)
    assert list(made.dropped.values()) == [3] and "Paul, Lucy, Mark" in next(iter(made.dropped))
    for split in (made.train, made.dev, made.test):
        assert isinstance(split, Counterfactuals)
        assert len(split.answers) == 45
        for batch in (split.base, *split.sources.values()):
            assert not (ids_of(batch) == tokenizer.unk_token_id)[batch.inputs["attention_mask"].bool()].any()
    assert "left out: 3 answers" in repr(made)


def _settings(name: str) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [load_task(name).sample(rng, split) for split in ("train", "dev", "test") for _ in range(400)]


# --- chat ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def test_a_message_holds_the_prompt_and_its_spans() -> None:
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="has no chat template"):
        as_message(tokenizer, "x yes", {})
    talking = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATE)
    text, spans = as_message(talking, " x yes", {"word": (3, 6)})
    assert text == "[user] x yes\n[assistant]\n" and text[slice(*spans["word"])] == "yes"
    made = from_texts(talking, base=["x yes or"], source=["x no or"], answer=["no"], base_answer=["yes"], chat=True,
                      spans={"word": {"base": ["yes"], "source": ["no"]}})  # fmt: skip
    row = ids_of(made.base)[0]
    assert talking.decode(row) == "[user] x yes or\n[assistant]\n"
    assert talking.decode(row[made.base.columns["word"][0]]) == " yes"
    assert made.tokens is not None
    assert talking.convert_ids_to_tokens(made.tokens.tolist()) == ["yes", "no"]  # no space behind a new line


# --- logits of answers of several tokens --------------------------------------------------------------------

SPELLED = [(7, 8), (7, 9, 10), (11,), (12, 13), (7, 9, 14)]


def spelled_pairs(whole: bool) -> Counterfactuals:
    data = counterfactuals(3).rows(torch.arange(12))
    names = tuple("abcde")
    number: dict[str, Any] = {"base_answer": data.base_answer % 5, "answer": data.answer % 5}
    return replace(data, **number, answers=names, tokens=as_tensor(SPELLED), whole=whole)


def scores_by_hand(ids: Tensor, whole: bool, state: Tensor | None = None) -> Tensor:
    """(pairs, answers), token by token, with the state at a block and position replaced."""
    model: Any = tiny().model
    found = torch.zeros(len(ids), len(SPELLED))
    for i, row in enumerate(ids):
        for a, answer in enumerate(SPELLED):
            short = answer if whole else distinguishing(SPELLED)[a]
            for j, token in enumerate(short):
                given = torch.cat([row, torch.tensor(short[:j], dtype=torch.long)])[None]

                def edit(_: Any, __: Any, output: Any, i: int = i) -> Any:
                    stream = output if isinstance(output, Tensor) else output[0]
                    if state is not None:
                        stream[:, 2] = state[i]
                    return output

                handle = model.transformer.h[0].register_forward_hook(edit)
                with torch.no_grad():
                    logits = model(given).logits[0, -1]
                handle.remove()
                goes_on = {two[j] for two in SPELLED if two[:j] == short[:j]}
                over = logits if whole else logits[sorted(goes_on)]
                found[i, a] += logits[token] - over.logsumexp(-1)
    return found


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_logits_of_answers_are_sums_of_log_probabilities(whole: bool, frozen: bool) -> None:
    data, site = spelled_pairs(whole), SITES[0]
    prepared = PreparedPairs.of(tiny(), data, [{"v": site}], frozen=frozen)
    assert isinstance(prepared.engine, SpelledAnswers) and len(prepared) == 12
    assert "rows a pair" in prepared.engine.describe()
    torch.testing.assert_close(prepared.unedited, scores_by_hand(ids_of(data.base), whole))
    edit = {site: full_vector(32)}
    state = states_by_hook(ids_of(data.sources["v"]), Site("block_output", 0, "2"))
    some = torch.tensor([3, 0, 3, 11])
    outcomes = prepared.outcomes({"v": site}, [edit, edit], some)
    by_hand = scores_by_hand(ids_of(data.base), whole, state)[some]
    for outcome in outcomes:
        torch.testing.assert_close(outcome.logits, by_hand)
    assert not torch.allclose(by_hand, prepared.unedited[some])


def test_of_the_vocabulary_every_token_of_an_answer_is_the_highest() -> None:
    data, model = counterfactuals(3).rows(torch.arange(12)), tiny().model
    ids = ids_of(data.base)
    with torch.no_grad():
        first = model(ids).logits[:, -1].argmax(-1)
        second = model(torch.cat([ids, first[:, None]], 1)).logits[:, -1].argmax(-1)
    said = list(zip(first.tolist(), second.tolist(), strict=True))
    spelled = [said[0], (said[0][0], (said[0][1] + 1) % 50), next(one[:1] for one in said if one[0] != said[0][0])]
    number = torch.zeros(12, dtype=torch.long)
    asked = replace(data, answers=("a", "b", "c"), tokens=as_tensor(spelled), answer=number, base_answer=number)
    found = PreparedPairs.of(tiny(), asked, [{"v": SITES[0]}]).without_edit().vocabulary()
    expected = [
        0 if one == spelled[0] else 1 if one == spelled[1] else 2 if one[:1] == spelled[2] else -1 for one in said
    ]
    assert found.tolist() == expected and {0, 2} <= set(expected)


def test_single_tokens_scored_whole_differ_as_their_logits_do() -> None:
    data = counterfactuals(3)
    assert data.tokens is not None
    columns = torch.stack([data.tokens, torch.full_like(data.tokens, -1)], 1)
    engine = SpelledAnswers(replace(data, tokens=columns, whole=True), lambda b, r: PlainEngine(tiny(), b, r))
    plain = answer_engine(data, lambda b, r: PlainEngine(tiny(), b, r))
    rows = torch.arange(PAIRS)
    with torch.no_grad():
        one, other = engine.logits(rows, {}), plain.logits(rows, {})[:, 0]
    torch.testing.assert_close(one - one[:, :1], other - other[:, :1])
    assert (one < 0).all()


def test_a_search_learns_with_answers_of_several_tokens() -> None:
    split = spelled_pairs(True)
    fits = sweep(tiny(), Pairs(split, split, split), SITES[:1], [DAS(4), FullVector()], min_accuracy=None,
                 config=replace(QUICK, steps=40, batch_size=12), quiet=True)  # fmt: skip
    losses = fits.where(method=DAS(4))[0].losses
    assert sum(losses[-5:]) < sum(losses[:5])


def test_positions_of_prompts_padded_on_the_left_are_the_prompts_own() -> None:
    data = spelled_pairs(False)
    ids = ids_of(data.base)
    pad = torch.zeros(len(ids), 3, dtype=torch.long)
    left = replace(data.base, inputs={"input_ids": torch.cat([pad, ids], 1),
                                      "attention_mask": torch.cat([pad, torch.ones_like(ids)], 1)})  # fmt: skip
    both = [
        PreparedPairs.of(tiny(), replace(data, base=base), [{"v": SITES[0]}]).unedited
        for base in (data.base, left)
    ]
    torch.testing.assert_close(*both)


# --- pairs that count ---------------------------------------------------------------------------------------


def told(backbone: Any, ids: Tensor) -> Tensor:
    model: nn.Module = backbone.model
    with torch.no_grad():
        return model(ids).logits[:, -1][:, counterfactuals(0).tokens].argmax(-1)


def half_right(seed: int) -> Counterfactuals:
    """Random texts of which the model is right on two of three bases and three of four sources."""
    data = counterfactuals(seed)
    base, source = told(tiny(), ids_of(data.base)), told(tiny(), ids_of(data.sources["v"]))
    at = torch.arange(PAIRS)
    return replace(
        data,
        base_answer=torch.where(at % 3 == 0, (base + 1) % 12, base),
        source_answers={"v": torch.where(at % 4 == 0, (source + 1) % 12, source)},
    )


def test_pairs_count_where_base_and_sources_are_right() -> None:
    data = half_right(0)
    base, pair = right(tiny(), data)
    at = torch.arange(PAIRS)
    assert base.tolist() == (at % 3 != 0).tolist() and pair.tolist() == ((at % 3 != 0) & (at % 4 != 0)).tolist()
    unknown = replace(data, source_answers={})
    assert right(tiny(), unknown)[1].tolist() == base.tolist()
    twice = data.rows(torch.tensor([4, 5, 4, 4]))
    assert right(tiny(), twice)[1].tolist() == [pair[i].item() for i in (4, 5, 4, 4)]


def test_a_search_counts_them_and_says_so() -> None:
    data = half_right(0)
    given = Pairs(lambda step: counterfactuals(step), data, data)
    kept = only_answered(tiny(), given)
    assert kept.train is given.train and len(kept.test) == 30 == len(kept.dev)
    assert kept.answered["test"] == {"base": 40, "pair": 30, "of": 60}
    assert kept.dropped["test pairs whose base or source the model answers wrong"] == 30
    with pytest.raises(ValueError, match=r"answers 0\.67 .* of 60 bases .* less than the 0\.9"):
        only_answered(tiny(), given, min_accuracy=0.9)
    fixed = Pairs(data, data, data)
    options: dict[str, Any] = {"methods": [FullVector()], "config": QUICK, "quiet": True}
    fits = search(tiny(), fixed, SITES[:1], min_accuracy=0.5, **options)
    assert fits[0].iia.n == 30 and fits.facts["answered"]["test"]["of"] == 60
    assert "30 of 60 test pairs. Of these 60 bases it answers 40 right" in " ".join(str(fits).split())
    for more in ({"min_accuracy": 0.5, "right_only": False}, {"min_accuracy": None}):
        every = search(tiny(), fixed, SITES[:1], **options, **more)
        assert every[0].iia.n == 60 and every.facts["answered"] == {} and "Left out" not in str(every)
    none = replace(data, base_answer=(told(tiny(), ids_of(data.base)) + 1) % 12)
    with pytest.raises(ValueError, match="none of the 60 test pairs right"):
        search(tiny(), Pairs(none, none, none), SITES[:1], min_accuracy=0.0, **options)


def test_tasks_know_the_answers_of_their_sources() -> None:
    from subspace_lab.das.counterfactuals import counterfactual_dataset

    task = load_task("story_gender")
    rows = counterfactual_dataset(task, 20, split="train", seed=0)
    made = encode(rows, byte_level(), list(task.answers.values()))
    for row, answer in zip(rows, made.source_answers["gender"], strict=True):
        assert row["source_answers"]["gender"] == ("▁She" if "girl" in row["sources"]["gender"] else "▁He")
        assert made.answers[int(answer)] == row["source_answers"]["gender"]


def test_a_token_that_joins_prompt_and_answer_is_not_taken_for_the_answers() -> None:
    """With "(b" in one token, "(be" is longer than "(" and does not begin with it: "e" alone is not the answer."""
    pieces = ["<unk>", "(", ".", ":", "\n", "b", "e", "(b"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("(", "b")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    assert Speller(tokenizer)("(", "be") == (vocabulary["b"], vocabulary["e"])
