"""Docstrings as mkdocstrings reads them best: examples as code, and an entry for each of several names of one line."""

from __future__ import annotations

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = prepared(obj.docstring.value)


def prepared(text: str) -> str:
    """The text with a fence around each paragraph of examples (>>>), and `a, b: what they are` as two entries."""
    text = re.sub(r"^>>> .*(?:\n.+)*", lambda found: f"```pycon\n{found[0]}\n```", text, flags=re.MULTILINE)
    sections = re.split(r"(?m)^(?=\S.*:$)", text)
    return "".join(map(_apart, sections))


def _apart(section: str) -> str:
    if not re.match(r"(Args|Attributes):$", section.partition("\n")[0]):
        return section
    return SEVERAL.sub(
        lambda found: "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", ")), section
    )
