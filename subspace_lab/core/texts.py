"""Texts of others on the way to a terminal."""

from __future__ import annotations

import unicodedata

# They turn the direction of what follows, so that a line reads otherwise than it is.
TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def printable(text: str) -> str:
    """The text with a sign in the place of each character that would act on a terminal instead of being shown.

    Prompts, answers, file names and messages of other libraries may hold escape sequences, which move the cursor,
    write the clipboard or change what stands there. New lines and tabs stay.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _acts(character) else character for character in text)


def _acts(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or ord(character) in TURNS
