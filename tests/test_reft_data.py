"""Prompts and answers as rows of ids: chat templates, tokenizers that join words, padding, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from families import build
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TokenizersBackend

from subspace_lab.reft import PromptCollator, ReftConfig, get_reft_model, tokenise
from subspace_lab.reft.datafiles import read_examples

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "say", "hi", "no", "yes", "now", "please"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} : {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant : {% endif %}"
)


def make_tokenizer(pad: str | None = "<pad>", template: str = TEMPLATE) -> TokenizersBackend:
    """Words of a small vocabulary, split at spaces."""
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> list[Any]:
    return [WORDS.index(word) for word in text.split()]


def split(row: dict[str, Any]) -> tuple[Any, Any]:
    """(prompt, answer) of a row of ids, by its labels."""
    ids, labels = row["input_ids"], row["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    assert labels[start:] == ids[start:] and set(labels[:start]) == {-100}
    return ids[:start], ids[start:]


def test_columns_of_prompts_and_answers() -> None:
    rows = tokenise([{"prompt": "say hi", "answer": " now please"}], make_tokenizer())
    assert split(rows[0]) == (ids("say hi"), ids("now please </s>"))
    assert rows[0]["attention_mask"] == [1] * 5
    rows = tokenise([{"q": "say hi", "a": " no"}], make_tokenizer(), prompt="q", answer="a", end=False)
    assert split(rows[0]) == (ids("say hi"), ids("no"))
    rows = tokenise([{"prompt": "say hi", "answer": " now please"}], make_tokenizer(), max_length=3)
    assert split(rows[0]) == (ids("say hi"), ids("now"))


def test_a_tokenizer_that_joins_prompt_and_answer_is_kept_from_it() -> None:
    """The prompt's ids are those that generation will see."""
    rows = tokenise([{"prompt": "say h", "answer": "i now"}], make_tokenizer(), end=False)
    prompt, answer = split(rows[0])
    assert prompt == [*ids("say"), 3] and answer == [3, *ids("now")]


def test_chat_templates() -> None:
    talk = [
        {"role": "user", "content": "say hi"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "yes now"},
    ]
    template = TEMPLATE.replace("<s>", "<s> ").replace("</s>", " </s> ")
    (row,) = tokenise([{"messages": talk}], make_tokenizer(template=template))
    before = ids("<s> user : say hi </s> <s> assistant : hi </s> <s> user : no </s> <s> assistant :")
    assert split(row) == (before, ids("yes now </s>"))
    with pytest.raises(ValueError, match="Example 0: the last of the messages must be the assistant's"):
        tokenise([{"messages": talk[:3]}], make_tokenizer(template=template))
    with pytest.raises(ValueError, match="Example 1: the last"):
        tokenise([{"messages": talk}, {"messages": []}], make_tokenizer(template=template))


def test_a_template_that_writes_a_conversation_otherwise_than_its_beginning_is_refused() -> None:
    """Labels cut at the prompt's length would then begin in the wrong place."""
    odd = (
        "{% if add_generation_prompt %}now now now {% endif %}{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    talk = [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi no no no"}]
    with pytest.raises(ValueError, match="Example 0: the chat template"):
        tokenise([{"messages": talk}], make_tokenizer(template=odd))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "No examples"),
        ([{"prompt": "", "answer": "hi"}], r"Example 0 has no text in \['prompt'\]"),
        (
            [{"prompt": "say", "answer": "hi"}, {"prompt": "say", "answer": ""}],
            r"Example 1 has no text in \['answer'\]",
        ),
        ([{"question": "say", "answer": "hi"}], r"\['prompt'\]; it has the columns \['answer', 'question'\]"),
        (
            [{"prompt": "say hi now", "answer": "hi"}],
            "'say hi now' …\\): its prompt has 3 tokens, which leave no room",
        ),
        ([{"prompt": "   ", "answer": "hi"}], "0 tokens of the prompt"),
    ],
)
def test_rows_that_teach_nothing_are_refused(rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenise(rows, make_tokenizer(), max_length=3)


ROWS = [{"prompt": "say hi now please", "answer": " no"}, {"prompt": "say", "answer": " yes yes"}]


def test_the_collator_pads_rows_and_tokenises_text() -> None:
    tokenizer = make_tokenizer()
    collator = PromptCollator(tokenizer, prompt_lengths=True)
    from_text = collator(ROWS)
    from_ids = collator(list(tokenise(ROWS, tokenizer)))
    assert from_text.keys() == from_ids.keys() == {"input_ids", "attention_mask", "labels", "prompt_lengths"}
    for key, value in from_text.items():
        assert torch.equal(value, from_ids[key])
    assert from_text["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert from_text["labels"][1].tolist() == [-100, *ids("yes yes </s>"), -100, -100]
    assert from_text["prompt_lengths"].tolist() == [4, 1]
    assert "prompt_lengths" not in PromptCollator(tokenizer)(ROWS)
    bare = [{k: v for k, v in row.items() if k != "attention_mask"} for row in tokenise(ROWS, tokenizer)]
    assert torch.equal(collator(bare)["attention_mask"], from_text["attention_mask"])


def test_a_tokenizer_without_pad_token_needs_none() -> None:
    """Padding is hidden by the mask, so whichever token fills it, each row's loss is the row's alone."""
    model = get_reft_model(build("llama"), ReftConfig(rank=2, positions="f1+l1", start="paper"))
    collator = PromptCollator(make_tokenizer(pad=None))
    together = collator(ROWS)
    with torch.no_grad():
        loss = model(**together).loss
        alone = [model(**collator([row])) for row in ROWS]
    counts = (together["labels"] != -100).sum(1)
    expected = sum(a.loss * n for a, n in zip(alone, counts, strict=True)) / counts.sum()
    torch.testing.assert_close(loss, expected)


def test_examples_that_are_the_same_stay_on_one_side(tmp_path: Path) -> None:
    """Whatever the seed and the number; without any the split is that of a permutation."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {i % 7}", "answer": f" hi  {i % 7}" if i % 2 else f"hi {i % 7}"} for i in range(21)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(path)
    assert examples.repeated == 14
    for seed in range(5):
        for n in (1, 3, 5, 9):
            kept, held = examples.split(n, seed)
            sides = [
                {" ".join(f"{one['prompt']} {one['answer']}".split()) for one in part} for part in (kept, held)
            ]
            assert not sides[0] & sides[1] and len(kept) + len(held) == 21
            assert len(held) == max(3, n // 3 * 3)
    path.write_text("".join(json.dumps({"prompt": f"{i}", "answer": "b"}) + "\n" for i in range(21)))
    kept, held = read_examples(path).split(5, 3)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3)).tolist()
    assert [one["prompt"] for one in held] == [str(i) for i in sorted(order[:5])] and len(kept) == 16


def test_the_loop_says_what_it_needs() -> None:
    """Examples that are not tokenised, and a model that is not wrapped (tried without the tests' own type checks)."""
    import subprocess
    import sys

    program = (
        "from torch import nn\nfrom subspace_lab import ReftConfig, finetune, get_reft_model\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))\n"
        "rows = [{'prompt': 'a', 'answer': 'b'}]\n"
        "for one in (model, get_reft_model(model, ReftConfig(rank=1))):\n"
        "    try: finetune(one, rows, quiet=True)\n"
        "    except (TypeError, ValueError) as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("TypeError model is of type GPT2LMHeadModel") and "get_reft_model" in first
    assert second.startswith("ValueError The examples have ['answer', 'prompt']") and "tokenise" in second
