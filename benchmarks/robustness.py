"""Bad inputs and faults, replayed: what comes of each, and whether it is what stands beside it.

    python benchmarks/robustness.py [--quick] [--json PATH] [--device cpu] [--seed N] [--show]

The cases are data: `_bad_inputs_cli.py` (the two commands), and `_bad_inputs_reft.py`, `_bad_inputs_engine.py` and
`_bad_inputs_work.py` (Python). Beside each stands what it must come to: a refusal whose text is named, or a right
value. Counted are

    tried            cases
    refused          ended in the refusal that is expected, in one line where a command was called
    right            gave the right value
    tracebacks       ended in another error than the expected one, or in more than one line
    silently_wrong   went on where a refusal is expected, or gave a wrong value
    work_lost        refused, and yet left half of its results where they were to be written

Everything runs in this process, on models of a few thousand parameters and the decoder that comes along, and on the
processor, since devices are among the odd inputs. `--quick` takes every tenth case, and `--seed` where it begins.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import figure, options, report

TENTH = 10
OUTCOMES = ("refused", "right", "tracebacks", "silently_wrong", "work_lost")


def of_command(case: Any, folder: Path) -> tuple[str, str]:
    """What comes of a command: (outcome, what was seen)."""
    from typer.testing import CliRunner

    from subspace_lab.cli import app

    out = folder / "made" / "for it"
    arguments = [*case.make(folder), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, input="y\n" * 9)
    told = (result.stderr or "").strip()
    lines = [line for line in told.splitlines() if "━" not in line]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "tracebacks", repr(result.exception)
    if case.refused is None:
        good = result.exit_code == 0 and case.right(out)
        return ("right", "") if good else ("tracebacks" if result.exit_code else "silently_wrong", told)
    if result.exit_code == 0:
        return "silently_wrong", "went on"
    if out.exists() and any(out.iterdir()):
        return "work_lost", str([path.name for path in out.iterdir()])
    whole = " ".join(lines).lower()
    named = all(part.lower() in whole for part in case.refused)
    return ("refused", "") if len(lines) == 1 and named else ("tracebacks", told)


def of_call(case: Any, folder: Path) -> tuple[str, str]:
    """What comes of a call from Python: (outcome, what was seen)."""
    try:
        result = case.run(folder)
    except Exception as error:  # whatever comes: it is held against what is expected
        if case.refused is None:
            return "tracebacks", repr(error)
        kind, text = case.refused
        return ("refused", "") if isinstance(error, kind) and text in str(error) else ("tracebacks", repr(error))
    if case.refused is not None:
        return "silently_wrong", f"went on: {str(result)[:200]}"
    return ("right", "") if bool(result) else ("silently_wrong", f"not right: {str(result)[:200]}")


def lists() -> Iterator[tuple[str, list[Any], Callable[[Any, Path], tuple[str, str]]]]:
    """(name, cases, how one is tried)."""
    import _bad_inputs_cli
    import _bad_inputs_engine
    import _bad_inputs_reft
    import _bad_inputs_work

    yield "commands", list(_bad_inputs_cli.cases()), of_command
    yield "reft", list(_bad_inputs_reft.CASES), of_call
    yield "faults and texts", list(_bad_inputs_work.CASES), of_call
    yield "core, model, engine, das", list(_bad_inputs_engine.CASES), of_call


def main() -> None:
    parser = options(__doc__, "Every tenth case.", "of --quick: at which case it begins")
    parser.add_argument("--show", action="store_true", help="print every case and its outcome")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error(f"--device {args.device}: the cases run on the processor; only cpu is possible")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    started = time.perf_counter()
    for name, cases, attempt in lists():
        if args.quick:
            cases = cases[args.seed % TENTH :: TENTH]
        for i, case in enumerate(cases):
            with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
                outcome, seen = attempt(case, Path(scratch))
            counts[outcome] += 1
            kinds.setdefault(str(case.kind), Counter())[outcome] += 1
            if args.show or outcome not in ("refused", "right"):
                print(f"{name}: {case.name} (kind {case.kind}): {outcome} {seen}", file=sys.stderr)
            print(f"  {name} {i + 1}/{len(cases)}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{'kind':>6} {'tried':>6} " + " ".join(f"{outcome:>15}" for outcome in OUTCOMES))
    for kind, of in sorted(
        kinds.items(), key=lambda item: (int("".join(filter(str.isdigit, item[0])) or 0), item[0])
    ):
        print(f"{kind:>6} {sum(of.values()):>6} " + " ".join(f"{of[outcome]:>15}" for outcome in OUTCOMES))
    results = {"tried": figure([float(sum(counts.values()))])}
    results |= {outcome: figure([float(counts[outcome])]) for outcome in OUTCOMES}
    results["seconds"] = figure([time.perf_counter() - started])
    report("robustness", {"quick": args.quick, "kinds": len(kinds)}, results, "cpu", args.json)


if __name__ == "__main__":
    main()
