"""A network and its inside: its blocks, batches of inputs, resolved sites, and runs with edits.

Knows core. Only `model/backbone.py` imports nnsight. The names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from subspace_lab.core._doors import door

if TYPE_CHECKING:
    from subspace_lab.model.backbone import Backbone
    from subspace_lab.model.batches import Batch
    from subspace_lab.model.intervene import collect, forward, generate
    from subspace_lab.model.merging import merge
    from subspace_lab.model.site_lists import list_sites

_HOMES = {
    "backbone": ("Backbone",),
    "batches": ("Batch",),
    "intervene": (
        "collect",
        "forward",
        "generate",
    ),
    "merging": ("merge",),
    "site_lists": ("list_sites",),
}

__all__ = [
    "Backbone",
    "Batch",
    "collect",
    "forward",
    "generate",
    "list_sites",
    "merge",
]

__getattr__, __dir__ = door(__name__, _HOMES)
