"""The model card of an alignment: its scores, and the controls and baselines to compare them with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

LISTED = ("model", "task", "data", "method", "seed", "start", "versions")
COMPARED = {"controls": "control", "baselines": "baseline"}

CARD = """---
library_name: subspace-lab
tags:
- causal-abstraction
- subspaces
---

# Alignment of {names}

{variables}

## Scores

{scores}

## Where it comes from

{facts}

```python
from subspace_lab.core.alignments import Alignment

alignment = Alignment.from_hub("the name of this repository")
edits, sites = alignment.edits(), alignment.sites
```
"""


def card(variables: Sequence[tuple[str, str, int, int]], facts: Mapping[str, Any]) -> str:
    """The card in Markdown, from (variable, site, rank, width) and the facts."""
    places = _table(["variable", "site", "rank", "width"], [[n, f"`{s}`", k, d] for n, s, k, d in variables])
    known = [key for key in LISTED if key in facts]
    known += [key for key in facts if key not in (*LISTED, "scores", *COMPARED)]
    listed = "\n".join(f"- {key}: {_plain(facts[key])}" for key in known)
    return CARD.format(
        names=", ".join(name for name, *_ in variables),
        variables=places,
        scores=_scores(facts),
        facts=listed or "Nothing was recorded.",
    )


def score_text(score: Any) -> str:
    """A score as text, with its interval and n if it has them."""
    if not isinstance(score, Mapping):
        return _plain(score)
    text = _plain(score.get("value"))
    if "low" in score and "high" in score:
        text += f" [{_plain(score['low'])}, {_plain(score['high'])}]"
    return text + (f", n = {score['n']}" if "n" in score else "")


def _scores(facts: Mapping[str, Any]) -> str:
    scores = facts.get("scores")
    if not scores:
        return "No score was recorded: this alignment claims nothing."
    lines = [("this alignment", scores)]
    for key, label in COMPARED.items():
        lines += [(f"{label}: {name}", found) for name, found in (facts.get(key) or {}).items()]
    metrics = list(dict.fromkeys(metric for _, found in lines for metric in found))
    body = [[name, *(score_text(found[m]) if m in found else "" for m in metrics)] for name, found in lines]
    text = _table(["", *metrics], body)
    missing = [label for key, label in COMPARED.items() if not facts.get(key)]
    if missing:
        text += f"\n\nNo {' and no '.join(missing)} was recorded. A score says little without one beside it."
    return text


def _table(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in every)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
