"""Public data sets as rows of pairs, in the format of `das/datafiles.py`, one file for each data set.

Each loader returns a list of rows. `load_pairs` turns them into pairs with any tokenizer:

    load_pairs(ravel("ravel/data", "city", "Country"), tokenizer, drop=True)
"""

from subspace_lab.das.loaders.causalgym import minimal_pairs, suite, templates_of
from subspace_lab.das.loaders.mib import (
    attribute_of,
    carry_of,
    counterfactuals_of,
    indirect_objects,
    position_of,
    token_of,
)
from subspace_lab.das.loaders.ravel import ravel

__all__ = [
    "attribute_of",
    "carry_of",
    "counterfactuals_of",
    "indirect_objects",
    "minimal_pairs",
    "position_of",
    "ravel",
    "suite",
    "templates_of",
    "token_of",
]
