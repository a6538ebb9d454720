"""An invertible map in the place of a subspace: its laws, what it refuses, and the warning that comes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_methods import problem
from tiny_sweeps import ANSWERS, SITES, WIDTH, ids_of, logits_by_hook, pairs, states_by_hook, swept
from torch import Tensor

from subspace_lab.analysis.comparisons import compare
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import proportion
from subspace_lab.core.interventions import interchange, loreft
from subspace_lab.core.nonlinear import InvertibleMap
from subspace_lab.core.subspaces import Axes
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, RevNet
from subspace_lab.das.objectives import complement_stays, iia

SITE = SITES[1]
D = 9


def moved(width: int = D, rank: int = 3, seed: int = 0, **settings: int) -> InvertibleMap:
    """Away from the identity at which it starts."""
    found = InvertibleMap(width, rank, scale=1.7, seed=seed, **settings).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return found


def states(seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 6, 2, D, generator=g, dtype=torch.double))


@pytest.mark.parametrize("width", [2, 8, 9])
def test_the_inverse_undoes_the_map(width: int) -> None:
    h = torch.randn(40, width, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 3
    found = moved(width, 1)
    torch.testing.assert_close(found.unmap(found.map(h)), h, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.map(found.unmap(h)), h, rtol=0, atol=1e-11)
    assert (found.map(h) - h / 1.7).abs().max() > 0.3
    # It is no linear map.
    two = found.map(torch.stack([h[0], h[1], (h[0] + h[1]) / 2]))
    assert (two[2] - (two[0] + two[1]) / 2).abs().max() > 1e-3


def test_blocks_are_their_formula() -> None:
    found, (h, _) = moved(blocks=1), states()
    one, other = (h / 1.7).split([4, 5], -1)
    one = one + found.to_first[0](other)
    torch.testing.assert_close(found.map(h), torch.cat([one, other + found.to_second[0](one)], -1))


def test_the_laws_of_reading_and_writing_hold() -> None:
    found, (h, source) = moved(), states()
    z, other = (
        found.read(source),
        torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.double),
    )
    torch.testing.assert_close(found.read(found.write(h, z)), z, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.write(h, found.read(h)), h, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.write(found.write(h, z), other), found.write(h, other), rtol=0, atol=1e-10)
    kept = found.map(found.swap(h, source))
    torch.testing.assert_close(kept[..., :3], found.map(source)[..., :3], rtol=0, atol=1e-10)
    torch.testing.assert_close(kept[..., 3:], found.map(h)[..., 3:], rtol=0, atol=1e-10)
    whole = moved(rank=D)
    torch.testing.assert_close(whole.swap(h, source), source, rtol=0, atol=1e-10)


def test_at_its_start_it_is_the_exchange_of_the_first_axes() -> None:
    h, source = (part.float() for part in states())
    edit = interchange(InvertibleMap(D, 3, scale=2.0, seed=0))
    torch.testing.assert_close(edit(h, source), interchange(Axes(D, [0, 1, 2]))(h, source), rtol=0, atol=1e-6)
    assert not torch.allclose(
        interchange(moved())(*states()), interchange(Axes(D, [0, 1, 2]))(*states()), atol=0.1
    )


def test_what_needs_a_basis_is_refused() -> None:
    found, (h, source) = moved(), states()
    for needs in (found.basis, lambda: loreft(found), lambda: found.embed(torch.zeros(3, dtype=torch.double))):
        with pytest.raises(TypeError, match="A nonlinear map has no basis"):
            needs()
    with pytest.raises(TypeError, match="Coordinates 0 to 1 of a nonlinear map"):
        found.sliced(0, 2)
    with pytest.raises(ValueError, match="batch, positions and width must agree"):
        interchange(found)(h, source[:1])
    for settings in ({"blocks": 0}, {"hidden": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="at least one block and unit, and a scale above 0"):
            InvertibleMap(D, 2, **settings)


def test_an_alignment_with_a_map_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    given = moved().float()
    Alignment({"v": (SITE, given)}).save(tmp_path / "found")
    again = Alignment.load(tmp_path / "found")
    h, source = (part.float() for part in states())
    (edit,) = again.edits().values()
    assert torch.equal(edit(h, source), interchange(given)(h, source))
    assert torch.equal(again.read({SITE: h})["v"], given.read(h)) and not any(
        p.requires_grad for p in again.subspace().parameters()
    )


# --- in a sweep ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fits() -> Fits:
    return swept([RevNet(3, hidden=8), DAS(2), RevNet(WIDTH, blocks=1)], SITES, metrics=[iia, complement_stays])


def test_its_scores_are_those_of_the_map_that_is_given_back(fits: Fits) -> None:
    assert not fits.failures
    data = pairs().test
    for fit in fits.where(method=RevNet):
        base, source = (states_by_hook(ids_of(b), fit.site) for b in (data.base, data.sources["v"]))
        found = fit.subspace()
        assert isinstance(found, InvertibleMap) and fit.start is not None and fit.start_overlap == {}
        for metric, of, answer in (
            ("iia", found.swap(base, source), data.answer),
            ("complement_stays", found.swap(source, base), data.base_answer),
        ):
            logits = logits_by_hook(ids_of(data.base), {fit.site: lambda _, states=of: states})  # type: ignore[misc]
            assert logits.shape[1] == len(ANSWERS)
            assert fit.score(metric) == proportion(logits.argmax(-1) == answer), (fit, metric)
        # It was trained, but for the whole, whose exchange is the source whatever the map is.
        assert bool((found.map(base) - base / found.scale).abs().max() > 1e-3) == (fit.rank < WIDTH)


def test_the_warning_is_below_every_table_and_no_overlap_is_made_up(fits: Fits) -> None:
    for shown in (repr(fits), fits._repr_html_()):
        assert " ".join(shown.split()).count("reaches about 100 % on randomly initialised models too") == 1
    assert "randomly initialised" not in repr(fits.where(method=DAS))
    assert "2507.08802" in str(RevNet.__doc__)
    assert all("DAS" in label or "block_output" in label for label in compare(fits).labels)
    assert len(compare(fits).labels) == 2


def test_maps_are_saved_with_their_fits(fits: Fits, tmp_path: Path) -> None:
    fits.save(tmp_path / "fits")
    again = Fits.load(tmp_path / "fits")
    h = torch.randn(5, WIDTH)
    for one, other in zip(fits, again, strict=True):
        assert one.method == other.method and torch.equal(one.subspace().read(h), other.subspace().read(h))
    assert repr(again) == repr(fits)


def test_several_in_one_run_are_what_each_is_alone(fits: Fits) -> None:
    alone = swept(RevNet(3, hidden=8), SITES[:1])[0]
    together = fits.where(method="RevNet", rank=3, site=SITES[0])[0]
    torch.testing.assert_close(torch.tensor(alone.losses), torch.tensor(together.losses), rtol=0, atol=1e-4)
    again = RevNet(3).learner(problem({"v": SITE})).edits[SITE].subspace.to_first[0][0].weight  # type: ignore[union-attr, index]
    same = RevNet(3).learner(problem({"v": SITE})).edits[SITE].subspace.to_first[0][0].weight  # type: ignore[union-attr, index]
    assert torch.equal(again, same)


def test_variables_at_one_site_are_refused_before_the_work() -> None:
    two = pairs(("v", "w"))
    with pytest.raises(ValueError, match=r"RevNet 1 for \['v', 'w'\] at \[block_output\[1\]@last\]"):
        swept(RevNet(), [SITE], pairs=two)
    with pytest.raises(ValueError, match=r"RevNet 33 at .*possible are 1 to 32"):
        swept(RevNet(33), [SITE])
    assert len(swept(RevNet(hidden=4), [{"v": SITES[0], "w": SITES[1]}], pairs=two)) == 1
    for settings in ({"rank": 0}, {"blocks": 0}, {"learning_rate": 0.0}, {"hidden": 0}):
        with pytest.raises(ValueError, match="above 0"):
            RevNet(**settings)
