"""Cities and their country, language and continent (after RAVEL, Huang et al. 2024, arXiv 2402.17700).

For a pretrained language model of English. A prompt asks for one attribute of a city. Exchanging an attribute must
change the answer if the prompt asks for it ("cause"), and must not change the answer if the prompt asks for another
one ("isolate"). In the world the country determines a city's language and continent, but not in the causal model:
there they are separate variables. Whether a network separates them is the question.

Cities are held out; every country has some in each split. The cities are those that SmolLM2-135M knows best.
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, cause_or_isolate, check_split
from subspace_lab.tasks.wording import fill

COUNTRIES = {
    "France": ("French", "Europe"),
    "Germany": ("German", "Europe"),
    "Italy": ("Italian", "Europe"),
    "Spain": ("Spanish", "Europe"),
    "Poland": ("Polish", "Europe"),
    "Russia": ("Russian", "Europe"),
    "Japan": ("Japanese", "Asia"),
    "China": ("Chinese", "Asia"),
    "Mexico": ("Spanish", "North America"),
    "Canada": ("English", "North America"),
    "Egypt": ("Arabic", "Africa"),
}
_CITIES = {
    "France": "Paris, Lyon, Marseille, Toulouse, Nice, Bordeaux, Strasbourg, Nantes, Lille, Rennes",
    "Germany": "Berlin, Munich, Hamburg, Frankfurt, Cologne, Dresden, Stuttgart, Leipzig, Bremen, Nuremberg",
    "Italy": "Rome, Milan, Naples, Turin, Florence, Venice, Bologna, Palermo, Genoa, Verona",
    "Spain": "Madrid, Barcelona, Seville, Valencia, Malaga, Bilbao, Granada, Zaragoza",
    "Poland": "Warsaw, Krakow, Gdansk, Poznan, Wroclaw, Lodz",
    "Russia": "Moscow, Novosibirsk, Vladivostok, Kazan, St. Petersburg, Omsk",
    "Japan": "Tokyo, Osaka, Kyoto, Nagoya, Hiroshima, Yokohama, Kobe, Sapporo, Nagasaki, Fukuoka",
    "China": "Beijing, Shanghai, Shenzhen, Wuhan, Guangzhou, Chengdu, Nanjing, Tianjin, Hangzhou, Xiamen",
    "Mexico": "Guadalajara, Cancun, Tijuana, Acapulco, Oaxaca, Puebla, Mexico City, Veracruz",
    "Canada": "Toronto, Vancouver, Edmonton, Calgary, Winnipeg, Ottawa",
    "Egypt": "Cairo, Alexandria, Luxor, Giza, Aswan, Suez",
}
ATTRIBUTES = ("country", "language", "continent")
TEMPLATES = {
    "country": (
        "The city of Oslo is in the country of Norway. The city of {entity} is in the country {last}",
        "Oslo is in the country of Norway. Lima is in the country of Peru. {entity} is in the country {last}",
    ),
    "language": (
        "People in Oslo speak Norwegian. People in Seoul speak Korean. People in {entity} {last}",
        "In Oslo, people speak Norwegian. In Seoul, people speak Korean. In {entity}, people {last}",
    ),
    "continent": (
        "The city of Lagos is on the continent of Africa. The city of Oslo is on the continent of Europe. The city of "
        "Hanoi is on the continent of Asia. The city of {entity} is on the continent {last}",
        "Lagos is on the continent of Africa. Oslo is on the continent of Europe. Hanoi is on the continent of Asia. "
        "{entity} is on the continent {last}",
    ),
}
_LAST = {"country": "of", "language": "speak", "continent": "of"}


def _split() -> tuple[dict[str, str], dict[str, dict[str, tuple[str, ...]]]]:
    """{city: its country}, and {split: {country: its cities}}; a sixth of the cities is dev, a third is test."""
    country_of: dict[str, str] = {}
    splits: dict[str, dict[str, tuple[str, ...]]] = {"train": {}, "dev": {}, "test": {}}
    for country, listed in _CITIES.items():
        cities = listed.split(", ")
        country_of |= dict.fromkeys(cities, country)
        random.Random(country).shuffle(cities)
        dev, test = len(cities) // 6, len(cities) // 3
        splits["dev"][country], splits["test"][country] = tuple(cities[:dev]), tuple(cities[dev : dev + test])
        splits["train"][country] = tuple(cities[dev + test :])
    return country_of, splits


COUNTRY_OF, CITIES = _split()


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """A country, one of its cities of the split, and the attribute that the prompt asks for."""
    check_split(split)
    cities = CITIES[split]
    return {
        "entity": rng.choice(cities[rng.choice(list(cities))]),
        "attribute": rng.choice(ATTRIBUTES),
        "template": rng.randrange(2),
    }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `entity`, the city, and `last`, the last word."""
    attribute = setting["attribute"]
    return fill(TEMPLATES[attribute][setting["template"]], {**setting, "last": _LAST[attribute]})


_VALUES = (*COUNTRIES, *(value for values in COUNTRIES.values() for value in values))

CITY_ATTRIBUTE = Task(
    name="city_attribute",
    description="country, language or continent of a city, whichever is asked for",
    causal_model=CausalModel(
        {
            "country": lambda entity: COUNTRY_OF[entity],
            "language": lambda entity: COUNTRIES[COUNTRY_OF[entity]][0],
            "continent": lambda entity: COUNTRIES[COUNTRY_OF[entity]][1],
            "answer": lambda attribute, country, language, continent: {
                "country": country,
                "language": language,
                "continent": continent,
            }[attribute],
        }
    ),
    variable="country",
    answers={value: f" {value}" for value in dict.fromkeys(_VALUES)},
    sample=sample,
    prompt=prompt,
    entity="entity",
    kind=cause_or_isolate,
)
