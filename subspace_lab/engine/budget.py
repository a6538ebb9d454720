"""How much memory may be used, on the model's device and on the host."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from subspace_lab.model.arguments import expect_integer

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
MEMORY = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The files in which Linux reports free memory, and the memory limit of this process's container."""


def budgets(memory: int | str | None, device: torch.device) -> tuple[int, int]:
    """(bytes on the device, bytes on the host).

    Args:
        memory: an amount for each of the two, in bytes or as text ("8GiB", "500MB"); None for half of the free memory
            of each.
        device: the model's device.

    Raises:
        TypeError: a number of bytes that is not whole.
        ValueError: less than 0, or text that is not an amount of memory.
    """
    if isinstance(memory, str):
        memory = _bytes(memory)
    if memory is not None:
        memory = expect_integer("memory", memory, 0)
        return memory, memory
    host = _free_on_host() // 2
    if device.type != "cuda":
        return host, host
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) // 2, host


def placement(
    one: int, rows: int, all_rows: int, budget: tuple[int, int], device: torch.device
) -> tuple[torch.device | None, str]:
    """(the device where the prefix is stored, in words where), with None as the device if it fits nowhere.

    Args:
        one: bytes that a pass over `rows` rows needs.
        rows: how many rows one pass has.
        all_rows: how many rows the data set has.
        budget: bytes on the device and on the host, as `budgets` returns them.
        device: the model's device.

    Raises:
        ValueError: not even one pass fits.
    """
    on_device, on_host = budget
    if one > max(budget):
        raise ValueError(
            f"A memory budget of {max(budget) / 2**20:.3g} MiB cannot hold one batch of {rows} rows, which "
            f"needs {one / 2**20:.3g} MiB; give more memory or a smaller chunk."
        )
    total = one * all_rows // max(1, rows)
    if total <= on_device:
        return device, f"on {device}"
    if total <= on_host:
        return torch.device("cpu"), "in host memory"
    return None, f"recomputed for each batch ({total / 2**20:.3g} MiB would not fit)"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"memory={text!r}: write a number of bytes, or text such as '8GiB' or '500MB'.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()])


def _free_on_host() -> int:
    """Bytes that this process may still use: free memory of the machine, within the limit of the container."""
    try:
        lines = MEMORY.read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # Without /proc/meminfo the free memory is unknown, so use a quarter of all memory.
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if hasattr(os, "sysconf") else 2**32
    try:
        allowed = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        facts = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    used -= int(facts.get("inactive_file", 0))  # cached files, which Linux drops when memory is needed
    return free if allowed == "max" else max(0, min(free, int(allowed) - used))
