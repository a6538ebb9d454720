"""The pieces of benchmarks/emoji_chatbot.py: what counts as an answer in emojis, and which prompts nobody chose on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    sys.path.insert(0, BENCHMARKS)
    import emoji_chatbot

    yield emoji_chatbot
    sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("answer", ["🐶", "❤️", "👩‍🚀🌌", "👍🏽 ⚽ ✈️", "🐶🐾🐱 ok", "1️⃣"])
def test_emojis_with_joiners_and_skin_tones(recipe: Any, answer: str) -> None:
    assert recipe.in_emojis(answer)


@pytest.mark.parametrize("answer", ["", " ", "Hello!", "I love it 🐶", "🐶🐾 ok", "�", "3 + 4", "犬", "café"])
def test_words_digits_and_broken_bytes_are_no_emojis(recipe: Any, answer: str) -> None:
    assert not recipe.in_emojis(answer)


def test_every_example_answers_in_emojis(recipe: Any) -> None:
    assert len(recipe.EXAMPLES) == 10 and all(map(recipe.in_emojis, recipe.EXAMPLES.values()))


def test_different_answers_are_counted_among_those_in_emojis(recipe: Any) -> None:
    assert recipe.scored(["🐶", "🐶", "🐱", "no", "nor this"]) == {"in emojis": 3, "different": 2}


def test_prompts_of_training_choice_and_test_are_disjoint(recipe: Any) -> None:
    prompts = [*recipe.EXAMPLES, *recipe.DEV, *recipe.TEST]
    assert len(set(prompts)) == len(prompts) == 30


def test_the_first_setting_is_the_lessons(recipe: Any) -> None:
    first = recipe.TRIED[0]
    assert (len(first.layers), first.rank, first.positions) == (1, 4, "last")
    assert len(set(recipe.TRIED)) == len(recipe.TRIED)
