"""Texts for people: made safe to print on a terminal, and numbers with their nouns."""

from __future__ import annotations

import unicodedata

# Characters that change the direction of the text after them, so that a line is displayed differently from its content.
TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def printable(text: str) -> str:
    """The text with a replacement for each character that would control a terminal instead of being shown.

    Prompts, answers, file names and messages of other libraries may contain escape sequences. These can move the
    cursor, write to the clipboard or change text that is already shown. New lines and tabs are kept.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or ord(character) in TURNS


def counted(number: int, one: str, several: str) -> str:
    """A number and its noun: "1 entity", "2 entities"."""
    return f"{number} {one if number == 1 else several}"


def two_decimals(value: float) -> str:
    """A number with two decimals; one that rounds to 0 has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"
