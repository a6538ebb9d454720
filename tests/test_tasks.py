"""The tasks: answers by rules written anew here, spans, splits, and the models that solve them."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SentencePieceBackend, TokenizersBackend

import subspace_lab
from subspace_lab.das.counterfactuals import counterfactual_dataset
from subspace_lab.tasks import entity_attribute, indirect_object, load_task, price_tagging, story_gender

SHIPPED = ("price_tagging", "indirect_object", "entity_attribute")
ALL = (*SHIPPED, "story_gender")
SPLITS = ("train", "dev", "test")
TINY_DECODER = Path(subspace_lab.__file__).parent / "assets" / "tiny_decoder"


@pytest.fixture(scope="module")
def tiny_decoder() -> tuple[Any, TokenizersBackend | SentencePieceBackend]:
    model = AutoModelForCausalLM.from_pretrained(TINY_DECODER)
    return model.eval(), AutoTokenizer.from_pretrained(TINY_DECODER)


@pytest.fixture(scope="module")
def stories(assets: Path) -> tuple[Any, TokenizersBackend | SentencePieceBackend]:
    folder = assets / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def settings_of(name: str, split: str, n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [load_task(name).sample(rng, split) for _ in range(n)]


@torch.no_grad()
def last_logits(model: Any, tokenizer: TokenizersBackend | SentencePieceBackend, texts: list[str]) -> torch.Tensor:
    """Next-token logits after each text, run as it stands: rows of one length together."""
    rows = tokenizer(texts)["input_ids"]
    logits = torch.empty(len(texts), model.config.vocab_size)
    for length in {len(row) for row in rows}:
        chosen = [index for index, row in enumerate(rows) if len(row) == length]
        logits[chosen] = model(torch.tensor([rows[index] for index in chosen])).logits[:, -1]
    return logits


def rule(name: str, text: str) -> str:
    """The answer read from the text alone, without the causal model and the setting."""
    words = text.split()
    if name == "price_tagging":
        lower, upper, amount = map(int, re.findall(r"\d+", text))
        return "yes" if amount in range(lower, upper + 1) else "no"
    if name == "indirect_object":
        names = [word for word in words if word[0].isupper()]
        return next(word for word in names if names.count(word) == 1)
    if name == "entity_attribute":
        entity = next(word for word in words if word in entity_attribute.FACTS)
        return entity_attribute.FACTS[entity]["food" in words]
    return "▁She" if "girl" in words else "▁He"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("split", SPLITS)
def test_the_causal_model_gives_the_answer_that_the_text_asks_for(name: str, split: str) -> None:
    task = load_task(name)
    for setting in settings_of(name, split, 300):
        assert task.answer(setting) == rule(name, task.prompt(setting).text)


@pytest.mark.parametrize("name", ALL)
def test_spans_point_at_the_words_they_name(name: str) -> None:
    task = load_task(name)
    span_names = set()
    for setting in settings_of(name, "train", 300):
        prompt = task.prompt(setting)
        span_names.add(frozenset(prompt.spans))
        for span, (start, end) in prompt.spans.items():
            if span in setting:
                assert prompt.text[start:end] == str(setting[span])
        assert prompt.spans["last"][1] == len(prompt.text)
    assert len(span_names) == 1  # every template has every position


@pytest.mark.parametrize("name", ALL)
def test_every_template_is_drawn_and_every_answer_balanced(name: str) -> None:
    module = {task.__name__.rsplit(".", 1)[1]: task for task in (price_tagging, indirect_object, entity_attribute)}
    templates = module.get(name, story_gender).TEMPLATES
    for split in SPLITS:
        settings = settings_of(name, split, 4000)
        assert {setting["template"] for setting in settings} == set(range(len(templates)))
        answers = [load_task(name).answer(setting) for setting in settings]
        shares = [answers.count(answer) / len(answers) for answer in set(answers)]
        assert max(shares) < 1.3 / len(shares) and min(shares) > 0.7 / len(shares)


def test_splits_share_no_amounts_names_or_entities() -> None:
    groups = {
        "price_tagging": lambda setting: setting["amount"],
        "indirect_object": lambda setting: setting["subject"],
        "entity_attribute": lambda setting: setting["entity"],
        "story_gender": lambda setting: setting["name"],
    }
    for name, key in groups.items():
        train, dev, test = ({key(setting) for setting in settings_of(name, split, 2000)} for split in SPLITS)
        assert len(train) >= 16 and len(dev) >= 8 and len(test) >= 16
        assert not train & dev and not train & test and not dev & test
    assert sum(map(len, indirect_object.NAMES.values())) >= 40 and len(entity_attribute.FACTS) >= 48
    few = {split: min(map(len, names.values())) for split, names in story_gender.NAMES.items()}
    assert few["train"] >= 12 and few["dev"] >= 4 and few["test"] >= 12


def test_price_amounts_fall_on_every_side() -> None:
    settings = settings_of("price_tagging", "test", 4000)
    below = sum(setting["amount"] < setting["lower"] for setting in settings) / 4000
    above = sum(setting["amount"] > setting["upper"] for setting in settings) / 4000
    assert abs(below - 0.25) < 0.04 and abs(above - 0.25) < 0.04
    assert all(setting["lower"] < setting["upper"] for setting in settings)


def test_entity_values_do_not_predict_each_other() -> None:
    """In each split each country goes with several foods and all values are equally frequent."""
    assert sorted(entity_attribute.ENTITIES) == sorted(SPLITS)
    for split, entities in entity_attribute.ENTITIES.items():
        facts = [entity_attribute.FACTS[entity] for entity in entities]
        for which in (0, 1):
            values = [fact[which] for fact in facts]
            assert {values.count(value) for value in set(values)} == {len(entities) // 6}
        several = 2 if split == "dev" else 4
        assert all(len({food for country, food in facts if country == one}) >= several for one, _ in facts)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("split", SPLITS)
def test_counterfactuals_can_be_drawn(name: str, split: str) -> None:
    task = load_task(name)
    rows = counterfactual_dataset(task, 40, split=split, seed=0)
    assert sum(rows["changes"]) == 20
    for row in rows:
        assert row["base_answer"] == rule(name, row["base"])
    both = counterfactual_dataset(
        task, 10, split=split, seed=0, variables=[task.variable, task.causal_model.output]
    )
    assert len(both) == 10


@pytest.mark.parametrize("name", ALL)
def test_unknown_splits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        load_task(name).sample(random.Random(0), "validation")


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'prices'; possible are \['price_tagging'"):
        load_task("prices")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_word_is_one_known_token(
    name: str, tiny_decoder: tuple[Any, TokenizersBackend | SentencePieceBackend]
) -> None:
    _, tokenizer = tiny_decoder
    task = load_task(name)
    for setting in [one for split in SPLITS for one in settings_of(name, split, 300)]:
        text = task.prompt(setting).text
        assert tokenizer.tokenize(text) == text.split()
        assert len(tokenizer(text)["input_ids"]) == len(text.split())  # no special tokens are added
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    ids: Any = tokenizer.convert_tokens_to_ids(list(task.answers.values()))
    assert len({*ids, tokenizer.unk_token_id}) == len(task.answers) + 1


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_model_solves_the_task(
    name: str, tiny_decoder: tuple[Any, TokenizersBackend | SentencePieceBackend]
) -> None:
    model, tokenizer = tiny_decoder
    task = load_task(name)
    settings = [one for split in SPLITS for one in settings_of(name, split, 200, seed=17)]
    guesses = last_logits(model, tokenizer, [task.prompt(setting).text for setting in settings]).argmax(-1)
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids([task.answer(setting) for setting in settings]))
    assert (guesses == wanted).float().mean() >= 0.99


def test_the_shipped_model_is_small() -> None:
    assert (TINY_DECODER / "model.safetensors").stat().st_size <= 4_000_000
    assert (TINY_DECODER / "training.json").is_file()


def test_the_stories_model_tells_the_gender_of_every_name_in_every_template(
    stories: tuple[Any, TokenizersBackend | SentencePieceBackend],
) -> None:
    """Its sign follows the word girl or boy, also with a name of the other list."""
    model, tokenizer = stories
    she, he = tokenizer.convert_tokens_to_ids(list(story_gender.STORY_GENDER.answers.values()))  # type: ignore[misc]
    settings = [
        {"gender_word": word, "name": name, "template": template}
        for word in ("girl", "boy")
        for split in story_gender.NAMES.values()
        for names in split.values()
        for name in names
        for template in range(len(story_gender.TEMPLATES))
    ]
    texts = [story_gender.prompt(setting).text for setting in settings]
    logits = last_logits(model, tokenizer, texts)
    female = torch.tensor([setting["gender_word"] == "girl" for setting in settings])
    assert torch.equal(logits[:, she] > logits[:, he], female)
