"""Tasks: a causal model, prompts that pose it, and the tokens that answer; one file each."""

from subspace_lab.das.counterfactuals import Task
from subspace_lab.tasks.entity_attribute import ENTITY_ATTRIBUTE
from subspace_lab.tasks.indirect_object import INDIRECT_OBJECT
from subspace_lab.tasks.price_tagging import PRICE_TAGGING
from subspace_lab.tasks.story_gender import STORY_GENDER

__all__ = ["ENTITY_ATTRIBUTE", "INDIRECT_OBJECT", "PRICE_TAGGING", "STORY_GENDER", "load_task"]

_TASKS = {
    "price_tagging": PRICE_TAGGING,
    "indirect_object": INDIRECT_OBJECT,
    "entity_attribute": ENTITY_ATTRIBUTE,
    "story_gender": STORY_GENDER,
}


def load_task(name: str) -> Task:
    """The task called `name`; ValueError, naming those that exist, for any other."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; possible are {list(_TASKS)}")
    return _TASKS[name]
