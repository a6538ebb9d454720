"""One variable exchanged at several sites at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_sweeps import SITES, counterfactuals, ids_of, logits_by_hook, pairs, states_by_hook, swapped, swept

from subspace_lab.core.estimates import proportion
from subspace_lab.core.sites import Site
from subspace_lab.das.methods import DAS, FullVector
from subspace_lab.das.several_sites import at_several_sites

PLACE = {"v early": SITES[0], "v late": SITES[1]}


def test_both_sites_take_the_states_of_the_one_source() -> None:
    given = pairs()
    both = at_several_sites(given, "v", list(PLACE))
    fits = swept([FullVector(), DAS(2)], [PLACE], pairs=both)
    data = given.test
    source = {site: states_by_hook(ids_of(data.sources["v"]), site) for site in SITES}
    edits: dict[Site, Any] = {site: (lambda _, states=states: states) for site, states in source.items()}
    full, das = fits
    logits = logits_by_hook(ids_of(data.base), edits)
    assert full.iia == proportion(logits.argmax(-1) == data.answer)
    assert das.iia == proportion(swapped(das, both.test).argmax(-1) == data.answer)
    # Neither site alone says the same.
    for site in SITES:
        alone = logits_by_hook(ids_of(data.base), {site: edits[site]})
        assert (alone - logits).abs().max() > 0.1


def test_what_belongs_to_the_variable_goes_with_it_and_the_rest_stays() -> None:
    both = at_several_sites(pairs(("v", "w")), "v", ["a", "b"])
    assert both.variables == ["a", "b", "w"]
    assert torch.equal(both.test.values["a"], both.test.values["b"])
    stream = at_several_sites(pairs(train=counterfactuals), "v", ["a", "b"])
    assert callable(stream.train)
    one, other = stream.train(3), counterfactuals(3)
    for name in ("a", "b"):
        assert torch.equal(ids_of(one.sources[name]), ids_of(other.sources["v"]))
    assert len(swept(DAS(1), [{"a": SITES[0], "b": SITES[1]}], pairs=stream)) == 1


def test_names_that_cannot_be_are_refused() -> None:
    for variable, names, message in (
        ("u", ["a", "b"], r"Unknown variable 'u'; the pairs have \['v', 'w'\]"),
        ("v", ["a"], "two or more different names"),
        ("v", ["a", "a"], "two or more different names"),
        ("v", ["a", "w"], r"none of them among \['w'\]"),
        ("v", "ab", "two or more different names"),
    ):
        with pytest.raises(ValueError, match=message):
            at_several_sites(pairs(("v", "w")), variable, names)
