"""The odd inputs of `benchmarks/_bad_inputs_reft.py` come to what stands beside each."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import _bad_inputs_reft as bad_inputs  # noqa: E402

sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("case", bad_inputs.CASES, ids=lambda case: case.name)
def test_it_comes_to_what_stands_beside_it(case: Any, tmp_path: Path) -> None:
    if case.kind == "6b":
        utils = pytest.importorskip("trl.trainer.utils")
        if not hasattr(utils, "add_fused_lm_head"):
            pytest.skip("before TRL 1.9")
    if case.refused is None:
        assert case.run(tmp_path)
        return
    kind, text = case.refused
    with pytest.raises(kind, match=re.escape(text)):
        case.run(tmp_path)


def test_the_list_is_long_enough_and_its_names_differ() -> None:
    names = [case.name for case in bad_inputs.CASES]
    assert len(names) >= 60 and len(set(names)) == len(names)
    for line in ("6b", "7", "8", "9", "10", "11", "12"):
        assert sum(case.kind == line for case in bad_inputs.CASES) >= 5
