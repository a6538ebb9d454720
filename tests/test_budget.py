"""How much memory may be used: what is free on the machine, in its container, and on a card."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import fresh, inputs

from subspace_lab.core.interventions import loreft
from subspace_lab.core.sites import Site
from subspace_lab.engine import budget
from subspace_lab.engine.budget import budgets, placement
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

CPU = torch.device("cpu")
MIB = 2**20
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Files in the place of Linux' own: 100 MiB free, and a container if one is described."""
    memory, group = tmp_path / "meminfo", tmp_path / "cgroup"
    memory.write_text(f"MemTotal: 999999999 kB\nMemFree: 7 kB\nMemAvailable: {100 * 1024} kB\n")
    group.mkdir()
    monkeypatch.setattr(budget, "MEMORY", memory)
    monkeypatch.setattr(budget, "CONTROL_GROUP", group)

    def container(limit: str, used: int, files: int = 0) -> None:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {files}\nactive_file {30 * MIB}\n")

    return container


def test_half_of_what_is_free_without_a_container(machine: Callable[..., Any]) -> None:
    assert budgets(None, CPU) == (50 * MIB, 50 * MIB)


@pytest.mark.parametrize(
    ("limit", "used", "files", "free"),
    [
        (str(80 * MIB), 60 * MIB, 0, 20 * MIB),
        (str(80 * MIB), 60 * MIB, 15 * MIB, 35 * MIB),  # read files are given up when memory is asked for
        (str(500 * MIB), 60 * MIB, 0, 100 * MIB),  # the machine has less than the container may use
        (str(80 * MIB), 90 * MIB, 0, 0),
        ("max", 60 * MIB, 0, 100 * MIB),
    ],
)
def test_a_container_may_use_less_than_the_machine_has(
    machine: Callable[..., Any], limit: str, used: int, files: int, free: int
) -> None:
    machine(limit, used, files)
    assert budgets(None, CPU) == (free // 2, free // 2)


@pytest.mark.parametrize("broken", ["memory.max", "memory.current", "memory.stat"])
def test_a_container_that_says_half_of_it_is_none(machine: Callable[..., Any], broken: str) -> None:
    machine(str(80 * MIB), 60 * MIB)
    (budget.CONTROL_GROUP / broken).unlink()
    assert budgets(None, CPU)[1] == 50 * MIB


def test_a_quarter_of_everything_where_nobody_says_what_is_free(
    machine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget.MEMORY.write_text("MemTotal: 5 kB\n")
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    assert budgets(None, CPU)[1] == 1000 * 4096 // 4 // 2


def test_a_data_set_that_a_container_cannot_hold_is_computed_again(machine: Callable[..., Any]) -> None:
    batch = Batch(inputs("llama", 40, 9))
    site, backbone = Site("block_output", 1, "last"), Backbone(fresh("llama"))
    readout = Readout.at(batch, "last")
    size = FrozenPast(backbone, batch, [site], readout, chunk=4).prefix.nbytes()  # type: ignore[union-attr]
    machine(str(80 * MIB), 80 * MIB - size)
    past = FrozenPast(backbone, batch, [site], readout, chunk=4)
    assert past.prefix is None and "computed" in past.describe()
    machine(str(80 * MIB), 80 * MIB - 2 * size - 2)
    assert FrozenPast(backbone, batch, [site], readout, chunk=4).prefix is not None


@pytest.mark.parametrize(
    ("memory", "expected"), [(12345, 12345), ("1KiB", 1024), ("2 MB", 2_000_000), ("0.5gib", 2**29), (0, 0)]
)
def test_an_amount_holds_for_each(machine: Callable[..., Any], memory: int | str, expected: int) -> None:
    machine("1", 1)
    assert budgets(memory, CPU) == (expected, expected)


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory=-1: at least 0"):
        budgets(-1, CPU)


def test_the_device_first_then_the_host_then_nowhere() -> None:
    card = torch.device("cuda", 0)
    assert placement(10, 2, 20, (100, 0), card) == (card, "on cuda:0")
    assert placement(10, 2, 20, (99, 100), card) == (CPU, "in host memory")
    assert placement(10, 2, 20, (99, 99), card)[0] is None
    with pytest.raises(ValueError, match="one batch of 2 rows"):
        placement(10, 2, 20, (9, 9), card)


# --- with a card --------------------------------------------------------------------------------------------


@needs_card
def test_a_card_offers_half_of_what_is_free_on_it() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    on_device, on_host = budgets(None, device)
    assert on_device <= total // 2 and abs(on_device - free // 2) <= free // 10
    assert on_host == pytest.approx(budgets(None, CPU)[1], rel=0.2)
    # What torch holds without using it is free as well.
    held = torch.empty(free // 4, dtype=torch.uint8, device=device)
    del held
    assert abs(budgets(None, device)[0] - on_device) <= free // 10


@needs_card
@pytest.mark.parametrize("where", ["on cuda", "in host memory", "recomputed"])
def test_resuming_on_a_card_is_the_plain_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the card's memory, from pinned memory of the host, and computed again."""
    device = torch.device("cuda")
    backbone = Backbone(fresh("llama", torch.float64).to(device))
    batch = Batch(inputs("llama", 8, 9, lengths=(9, 4, 7, 6, 9, 5, 3, 8))).to(device)
    site, readout = Site("block_output", 1, "last"), Readout.at(batch, "last")
    amounts = {"on cuda": (10**9, 10**9), "in host memory": (10, 10**9), "recomputed": (10, 5000)}[where]
    monkeypatch.setattr("subspace_lab.engine.frozen_past.budgets", lambda memory, device: amounts)
    past = FrozenPast(backbone, batch, [site], readout, chunk=1)
    assert past.mode == "keys and values" and where in past.describe(), past.describe()
    if past.prefix is not None:
        tensors = past.prefix.tensors()
        assert all(t.device.type == ("cuda" if where == "on cuda" else "cpu") for t in tensors)
        assert all(t.is_pinned() for t in tensors) == (where == "in host memory")
    edit = loreft(32, 2, seed=1, start="paper").to(device, torch.float64)
    rows = torch.tensor([5, 0, 3])
    numbers = []
    for engine in (past, PlainEngine(backbone, batch, readout)):
        logits = engine.logits(rows, {site: edit})
        numbers.append([logits, *torch.autograd.grad(logits.square().sum(), list(edit.parameters()))])
    for found, expected in zip(*numbers, strict=True):
        assert expected.norm() > 0 and (found - expected).norm() <= 1e-6 * expected.norm()
