"""The subspaces of ReFT edits: the directions that an edit reads and those that it writes.

An edit that is affine in the state changes h by Dᵀ(M h + v); for LoReFT, D = R and M = W − R. The singular value
decomposition Dᵀ M = Σ sᵢ uᵢ vᵢᵀ shows that the edit reads the directions vᵢ and writes the directions uᵢ, with the
strengths sᵢ. So an edit has two subspaces, while an interchange has one. Each of the two can be compared with a
subspace that DAS found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.reft.model import ReftModel

SMALLEST = 1e-6  # a singular value below this share of the largest is rounding


@dataclass(frozen=True)
class Directions:
    """What an edit reads and writes.

    Attributes:
        written: the span of D; its basis vectors are in descending order of strength.
        strengths: sᵢ of each written direction: how much further the edit moves the state along it if the state is 1
            further along the direction vᵢ. 0 if only v writes this direction, which does not depend on the state.
        read: the directions vᵢ with a strength above 0; None if the edit reads nothing, as with LobiReFT.
    """

    written: FixedSubspace
    strengths: tuple[float, ...]
    read: FixedSubspace | None


def directions(edit: Intervention) -> Directions:
    """The directions of one edit.

    Raises:
        TypeError: an edit that is not affine in the state, that changes the whole width (RED), or that needs a source.
    """
    folded = edit.folded()
    matrix = getattr(folded.value, "weight", None)
    if edit.needs_source or matrix is None or folded.write:
        raise TypeError(
            f"{type(edit.value).__name__} does not write an affine map of the state into a subspace, so it has no "
            "directions that it reads. Possible are LoReFT, NoReFT, DiReFT, ConsReFT and LobiReFT."
        )
    basis = folded.subspace.basis().detach().double().cpu()
    frame, factor = torch.linalg.qr(basis.T)
    left, sizes, right = torch.linalg.svd(factor @ matrix.detach().double().cpu(), full_matrices=False)
    kept = sizes > SMALLEST * sizes[0] if float(sizes[0]) > 0 else torch.zeros_like(sizes, dtype=torch.bool)
    sizes = torch.where(kept, sizes, 0.0)
    return Directions(
        written=FixedSubspace((frame @ left).T.contiguous()),
        strengths=tuple(sizes.tolist()),
        read=FixedSubspace(right[kept].contiguous()) if bool(kept.any()) else None,
    )


def reft_alignments(
    edits: ReftModel | Mapping[Site, Intervention], variable: str = "edited"
) -> dict[str, dict[Site, Alignment]]:
    """{"written": {site: alignment}, "read": {site: alignment}} of an adapter's edits, for `compare` and the measures.

    >>> sides = reft_alignments(reft, "gender")
    >>> compare({"DAS": fits.where(site=site), "LoReFT, read": sides["read"][site]}, across="method")

    Args:
        edits: the model with its active adapters, or {site: edit}.
        variable: the name of the variable in the alignments. To compare them with fits, use the fits' name.

    Raises:
        TypeError: as `directions`.
        ValueError: no edits.
    """
    adapters = [edits.adapter(name) for name in edits.active_adapters] if isinstance(edits, ReftModel) else []
    given = edits.edits() if isinstance(edits, ReftModel) else dict(edits)
    if not given:
        raise ValueError("No edits: no adapter is active, or the mapping is empty.")
    facts: dict[Site, dict[str, object]] = {}
    for adapter in adapters:
        config = adapter.config
        for number, site in enumerate(adapter.sites):
            # The random start of `Adapter`: two layers never share one, but two adapters with one seed do.
            start = f"{config.method} {config.rank} seed {config.seed}.{number}"
            facts[site] = {"method": config.method, "seed": config.seed, "start": start}
    found: dict[str, dict[Site, Alignment]] = {"written": {}, "read": {}}
    for site, edit in given.items():
        own = directions(edit)
        for side, subspace in (("written", own.written), ("read", own.read)):
            if subspace is not None:
                about = {**facts.get(site, {}), "side": side, "strengths": list(own.strengths)}
                if side == "read":  # W − R starts at 0, whatever the start of R is
                    about.pop("start", None)
                found[side][site] = Alignment({variable: (site, subspace)}, about)
    return found
