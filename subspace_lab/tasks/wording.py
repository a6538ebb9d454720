"""Makes prompts with named spans from templates."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from subspace_lab.das.counterfactuals import Prompt


def fill(template: str, words: Mapping[str, Any]) -> Prompt:
    """`template` with each `{name}` replaced by `words[name]`; the spans are those of the inserted words.

    A name that occurs twice has its last span. KeyError if `words` does not contain a name.
    """
    text, spans = "", {}
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            start, text = len(text), text + str(words[name])
            spans[name] = (start, len(text))
    return Prompt(text, spans)
