"""Pages of the repository as pages of the site: links that fit their new places, and notebooks as Markdown."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def relinked(
    text: str, page: str, places: dict[str, str], copy: Callable[[str], None], beside: Iterable[str] = ()
) -> str:
    """A page's text with links that fit its new place.

    Args:
        page: the path of the page in the repository.
        places: path in the repository → path in the site, of all pages.
        copy: called with the path of each other file that is linked; it gets the same path in the site.
        beside: names of files that lie beside the page in the site, and not in the repository.

    Raises:
        FileNotFoundError: a link to a file that does not exist.
    """
    here = posixpath.dirname(places[page])

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target) or target in beside:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path not in places:
            if not (ROOT / path).exists() or path.startswith(".."):
                raise FileNotFoundError(f"{page} links to {match[2]}, which does not exist.")
            if (ROOT / path).is_dir():  # a site has no page of a folder
                return match[1][1:-2]
            copy(path)
        return f"{match[1]}{posixpath.relpath(places.get(path, path), here or '.')}{hash_}{anchor})"

    # A link's text may hold code spans, so only fenced blocks are left out here.
    fenced = re.split(r"(^```.*?^```[ ]*$)", text, flags=re.MULTILINE | re.DOTALL)
    pattern = r"(\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\]\()([^()\s]+)\)"
    return "".join(part if i % 2 else re.sub(pattern, link, part) for i, part in enumerate(fenced))


def tutorial(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs, as Markdown and {name: content} of its pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    texts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            texts.append(source)
        elif cell["cell_type"] == "code":
            texts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                kind, content = _shown(output)
                if kind == "image/png":
                    name = f"{path.stem}_{len(pictures) + 1}.png"
                    pictures[name] = base64.b64decode(content)
                    texts.append(f"![what the cell above draws]({name})")
                elif kind == "text/plain":
                    texts.append(f"```{{ .text .output }}\n{content.rstrip()}\n```")
                else:
                    texts.append(f'<div class="output" markdown>\n\n{content.strip()}\n\n</div>')
    first = texts[0].partition("\n")
    origin = f"*This page is the notebook [{path.name}]({path.name}) with its stored outputs.*"
    return "\n\n".join([first[0], origin, first[2].strip(), *texts[1:]]) + "\n", pictures


def _shown(output: dict[str, Any]) -> tuple[str, str]:
    """The kind and the content of what a code host shows of an output."""
    if output["output_type"] == "stream":
        return "text/plain", "".join(output["text"])
    for kind in ("image/png", "text/markdown", "text/html", "text/plain"):
        if kind in output["data"]:
            return kind, "".join(output["data"][kind])
    raise ValueError(f"An output of the kinds {sorted(output['data'])} cannot be shown.")


def title_of(text: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert found, text[:100]
    return found[1]


def notebooks() -> list[Path]:
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


def shown_code() -> Iterator[str]:
    """The Python blocks of the README and of docs/, and the cells of the tutorials."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield from re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for path in notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])
