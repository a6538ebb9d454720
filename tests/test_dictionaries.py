"""Features of a sparse autoencoder: what is read, exchanged, chosen by a mask, saved and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_masked_methods import DIMENSIONS, PLACE, PLANTED, planted
from tiny_sweeps import SITES, WIDTH, ids_of, logits_by_hook, pairs, states_by_hook, swept
from torch import Tensor

from subspace_lab.analysis.comparisons import compare
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.dictionaries import Dictionary
from subspace_lab.core.estimates import proportion
from subspace_lab.core.interventions import Intervention, interchange, loreft
from subspace_lab.core.masks import Gates, Masked
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, Mask
from subspace_lab.das.sweeps import sweep

D, FEATURES = 6, 20
SITE = SITES[1]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def autoencoder(width: int = D, features: int = FEATURES, seed: int = 0) -> Dictionary:
    return Dictionary(
        drawn(features, width, seed=seed),
        drawn(features, width, seed=seed + 1),
        encoder_bias=drawn(features, seed=seed + 2),
        input_bias=drawn(width, seed=seed + 3),
        threshold=drawn(features, seed=seed + 4).abs(),
    )


def test_features_are_their_formula() -> None:
    found, h, source = autoencoder(), drawn(30, D, seed=7), drawn(30, D, seed=8)
    units = torch.einsum("fd,nd->nf", found.encoder, h - found.input_bias) + found.encoder_bias
    features = torch.where(units > found.threshold, units, torch.zeros_like(units))
    assert 0.1 < float((features > 0).double().mean()) < 0.7
    torch.testing.assert_close(found.read(h), features)
    z = drawn(30, FEATURES, seed=9)
    torch.testing.assert_close(found.write(h, z), h + (z - features) @ found.decoder)
    torch.testing.assert_close(found.swap(h, source), h + (found.read(source) - features) @ found.decoder)
    torch.testing.assert_close(interchange(found)(h, source), found.swap(h, source))
    torch.testing.assert_close(interchange(found)(h, h), h, rtol=0, atol=0)
    plain = Dictionary(found.encoder, found.decoder)
    torch.testing.assert_close(plain.read(h), (h @ found.encoder.T).relu())


def test_some_features_are_exchanged_and_the_others_are_not() -> None:
    found, h, source = autoencoder(), drawn(30, D, seed=7), drawn(30, D, seed=8)
    some = found.picked([4, 1, 11])
    torch.testing.assert_close(some.read(h), found.read(h)[:, [4, 1, 11]])
    change = (found.read(source) - found.read(h))[:, [4, 1, 11]] @ found.decoder[[4, 1, 11]]
    torch.testing.assert_close(some.swap(h, source), h + change)
    assert found.sliced(2, 5).rank == 3 and torch.equal(found.sliced(2, 5).encoder, found.encoder[2:5])
    given = torch.ones(2, D)
    copied = Dictionary(given, given)
    given.zero_()
    assert float(copied.encoder.sum()) == 2 * D


def test_a_soft_exchange_is_between_the_features_of_both() -> None:
    found, h, source = autoencoder(), drawn(30, D, seed=7), drawn(30, D, seed=8)
    gates = Gates(FEATURES)
    with torch.no_grad():
        gates.logits.copy_(drawn(1, FEATURES, seed=9))
    share = torch.sigmoid(gates.logits[0].double())
    expected = h + (share * (found.read(source) - found.read(h))) @ found.decoder
    torch.testing.assert_close(Intervention(found, Masked(gates.double()))(h, source), expected)


def test_a_mask_finds_the_planted_feature_among_more_than_there_are_dimensions() -> None:
    """A feature for each sign of the planted direction, and three times as many others as there are dimensions."""
    rotation = random_orthonormal(DIMENSIONS, DIMENSIONS, 3)
    backbone, data = planted(rotation)
    direction = (rotation[:, 0] + rotation[:, 1]) / 2**0.5
    others = torch.nn.functional.normalize(
        torch.randn(3 * DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(1))
    )
    others = torch.nn.functional.normalize(others - (others @ direction)[:, None] * direction)
    vectors = torch.cat([others[:20], direction[None], others[20:], -direction[None]])
    features = Dictionary(vectors, vectors)
    fit = sweep(backbone, data, [PLACE], [Mask(features=features, penalty=0.02)], config=PLANTED, quiet=True)[0]
    found = fit.subspace()
    assert isinstance(found, Dictionary) and found.rank < 10 and fit.iia.value > 0.98
    for sought in (direction, -direction):
        assert float((found.decoder @ sought).max()) > 0.999
    # The control: without these two features nothing is found.
    without = Dictionary(others, others)
    lost = sweep(backbone, data, [PLACE], [Mask(features=without, penalty=0.02)], config=PLANTED, quiet=True)[0]
    assert lost.iia.value < 0.8


@pytest.fixture(scope="module")
def fits() -> Fits:
    dictionary = autoencoder(WIDTH, 3 * WIDTH).float()
    return swept([Mask(features=dictionary), DAS(2)], SITES)


def test_what_is_scored_is_the_exchange_of_the_features_that_are_given_back(fits: Fits, tmp_path: Path) -> None:
    assert not fits.failures
    data = pairs().test
    for fit in fits.where(method=Mask):
        base, source = (states_by_hook(ids_of(b), fit.site) for b in (data.base, data.sources["v"]))
        found = fit.subspace()
        assert isinstance(found, Dictionary) and 1 <= found.rank < 3 * WIDTH and len(set(fit.losses)) > 1
        edited = found.swap(base, source)
        logits = logits_by_hook(ids_of(data.base), {fit.site: lambda _, states=edited: states})  # type: ignore[misc]
        assert fit.iia == proportion(logits.argmax(-1) == data.answer)
    fits.save(tmp_path / "fits")
    h = torch.randn(5, WIDTH)
    for one, other in zip(fits, Fits.load(tmp_path / "fits"), strict=True):
        assert torch.equal(one.subspace().read(h), other.subspace().read(h))
    assert all("Mask" not in label for label in compare(fits).labels)


def test_an_alignment_of_features_is_saved_to_the_bit(tmp_path: Path) -> None:
    given = autoencoder()
    Alignment({"v": (SITE, given)}).save(tmp_path / "found")
    again = Alignment.load(tmp_path / "found").subspace()
    h, source = drawn(4, D, seed=7), drawn(4, D, seed=8)
    assert isinstance(again, Dictionary) and torch.equal(again.swap(h, source), given.swap(h, source))


def test_what_cannot_be_is_refused_in_words() -> None:
    found = autoencoder()
    for needs in (found.basis, lambda: loreft(found)):
        with pytest.raises(TypeError, match="no orthonormal basis"):
            needs()
    eye = torch.eye(4)
    for arguments, options, message in (
        ((eye[:2], eye[:2].T), {}, r"encoder of shape \(2, 4\) and a decoder of shape \(4, 2\)"),
        ((eye[0], eye[0]), {}, r"needed are \(features, width\) for both"),
        ((eye, eye), {"encoder_bias": torch.zeros(3)}, r"encoder_bias of shape \(3,\); needed is \(4,\)"),
        ((eye, eye), {"threshold": torch.tensor([0.0, 0, -1, 0])}, "A threshold of -1"),
        ((eye, eye * torch.tensor([1.0, 1, 0, 1])), {}, "decoder"),
        ((eye * torch.nan, eye), {}, "encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            Dictionary(*arguments, **options)
    with pytest.raises(
        ValueError, match=r"a dictionary of states of width 6; at block_output\[1\]@last they have"
    ):
        swept(Mask(features=found), [SITE])
    with pytest.raises(ValueError, match="Search one variable at a time"):
        swept(Mask(features=autoencoder(WIDTH)), [SITE], pairs=pairs(("v", "w")))
