"""Tasks, one file each: a causal model, prompts that pose its problem, and the tokens that answer it."""

from subspace_lab.das.counterfactuals import Task
from subspace_lab.tasks.addition import ADDITION, DIGIT_SUMS
from subspace_lab.tasks.city_attribute import CITY_ATTRIBUTE
from subspace_lab.tasks.entity_attribute import ENTITY_ATTRIBUTE
from subspace_lab.tasks.indirect_object import INDIRECT_OBJECT
from subspace_lab.tasks.multiple_choice import MULTIPLE_CHOICE
from subspace_lab.tasks.number_agreement import NUMBER_AGREEMENT
from subspace_lab.tasks.price_tagging import PRICE_TAGGING
from subspace_lab.tasks.story_gender import STORY_GENDER

_TASKS = {
    task.name: task
    for task in (
        PRICE_TAGGING,
        INDIRECT_OBJECT,
        ENTITY_ATTRIBUTE,
        STORY_GENDER,
        CITY_ATTRIBUTE,
        NUMBER_AGREEMENT,
        ADDITION,
        DIGIT_SUMS,
        MULTIPLE_CHOICE,
    )
}

__all__ = [
    "ADDITION",
    "CITY_ATTRIBUTE",
    "DIGIT_SUMS",
    "ENTITY_ATTRIBUTE",
    "INDIRECT_OBJECT",
    "MULTIPLE_CHOICE",
    "NUMBER_AGREEMENT",
    "PRICE_TAGGING",
    "STORY_GENDER",
    "load_task",
]


def load_task(name: str) -> Task:
    """The task with this name. ValueError for an unknown name; the message lists the tasks."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; possible are {list(_TASKS)}")
    return _TASKS[name]
