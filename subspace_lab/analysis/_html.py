"""Parts of an HTML page that needs no other files. The functions that make HTML from a text also escape it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #222; line-height: 1.5; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid #ddd; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.05rem; }
.verdict { border-left: 5px solid #2b557e; padding: .5rem .9rem; background: #f4f2ec; max-width: 50rem; }
.verdict.no { border-color: #c8553d; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: left; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
thead th { border-bottom: 1px solid #999; }
.scores td, .scores th { white-space: nowrap; }
figure { margin: 1.2rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; }
figcaption, .small { color: #555; font-size: .86rem; }
pre { background: #f6f6f6; padding: .7rem; font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; margin: .5rem 0; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  body { font-size: 15px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
  img { max-width: none; width: 42rem; } /* wider than the screen, so that its numbers can be read: it scrolls */
}
@media print { main { max-width: none; } h2, figure { break-inside: avoid; } }
"""


def section(title: str, inside: str) -> str:
    """A part of the page with its heading; `inside` is HTML already."""
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>\n"


def paragraph(text: str, kind: str = "") -> str:
    """A text, escaped; `kind` is a class of `STYLE`."""
    return f"<p{f' class={kind!r}' if kind else ''}>{escape(text)}</p>\n"


def listed(entries: Mapping[str, Any]) -> str:
    """A list of names and their values, escaped."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
    return f"<dl>{items}</dl>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, escaped; it scrolls sideways if it is wider than the page."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n'


def figure_of(png: bytes, caption: str) -> str:
    """A picture, stored inside the page."""
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure><img alt="{escape(caption)}" src="{uri}"><figcaption>{escape(caption)}</figcaption></figure>\n'
    )


def number(value: Any) -> str:
    """A number with three digits; anything else as text."""
    return f"{value:.3g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value or "–")


def nulls(values: Any) -> str:
    """The lowest and the highest of some values, and how many there are; a single value alone."""
    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        numbers = [x for x in values if isinstance(x, int | float)]
        if len(numbers) == 1:
            return f"{numbers[0]:.2f}"
        if numbers:
            return f"{min(numbers):.2f} to {max(numbers):.2f} (n = {len(numbers)})"
    return "–" if values in (None, [], ()) else str(values)
