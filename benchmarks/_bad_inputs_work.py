"""Faults in the middle of work, and texts that tokenizers treat in odd ways, each with what it must come to.

Killed processes, folders that two runs want, files that outgrow what the system allows, interrupts; and answers, marks
and spans of texts. The cases are those of `_bad_inputs_engine.py`; most of the faults are the system's own.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

from _bad_inputs_case import Case
from _bad_inputs_engine import LAST, SITE, chain, of_numbers, swept
from datasets import Dataset

from subspace_lab.core.checkpoints import load_edits, save_edits
from subspace_lab.core.files import taken_folder, write_json, write_text
from subspace_lab.core.interventions import loreft
from subspace_lab.core.sites import Site
from subspace_lab.das.encoding import answer_tokens, encode, from_texts
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.search import search
from subspace_lab.das.sweeps import SweepInterrupted

# --- 3: one folder, several runs ----------------------------------------------------------------------------


def twice(folder: Path) -> None:
    with taken_folder(folder / "out"), taken_folder(folder / "out"):
        pass


def both_at_once(folder: Path) -> bool:
    """Of two that start together one has the folder, and the other is refused."""
    start, refused, had = Barrier(2), [], []
    done = Barrier(2)

    def run() -> None:
        start.wait()
        try:
            with taken_folder(folder / "out"):
                had.append(1)
                done.wait(timeout=60)
        except BlockingIOError as error:
            refused.append(str(error))
            done.wait(timeout=60)

    threads = [Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(had) == len(refused) == 1 and f"by process {os.getpid()}" in refused[0]


def killed(folder: Path, work: Callable[[Path], Any] = lambda _: None) -> Path:
    """A folder that a process had taken when it was killed, after `work` in it."""
    out = folder / "out"
    child = os.fork()
    if not child:
        try:
            with taken_folder(out):
                work(out)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return out


def after_a_kill(folder: Path) -> bool:
    """What a killed run left without a result is cleared and said."""
    out, said = killed(folder, lambda out: (out / f".results.json.{os.getpid()}").write_text("{")), []
    with taken_folder(out, said.append):
        names = [path.name for path in out.iterdir() if path.name.startswith(".results")]
        write_text(out / "results.json", "whole")
    return not names and len(said) == 1 and (out / "results.json").read_text() == "whole"


def kept_after_a_kill(folder: Path) -> Any:
    """Whole results of a killed run are never written over."""
    with taken_folder(killed(folder, lambda out: write_text(out / "results.json", "whole"))):
        return "taken"


def full(folder: Path, name: str = "mine.txt") -> Any:
    (folder / name).write_text("mine")
    with taken_folder(folder):
        return "taken"


def a_file(folder: Path) -> Any:
    (folder / "out").write_text("mine")
    with taken_folder(folder / "out"):
        return "taken"


def made_for_nothing(folder: Path) -> bool:
    try:
        with taken_folder(folder / "a" / "b"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return not list(folder.iterdir())


FOLDERS = [
    Case("a folder taken twice", "3", twice, (BlockingIOError, "by process")),
    Case("two runs that start together", "3", both_at_once),
    Case("a folder left by a killed run", "3", after_a_kill),
    Case(
        "unfinished files of a run that nobody knows",
        "3",
        lambda folder: full(folder, ".results.json.1"),
        (FileExistsError, "unfinished files of a process that was killed"),
    ),
    Case("whole results of a killed run", "3", kept_after_a_kill, (FileExistsError, "not empty")),
    Case("a folder with a file of the user's", "3", full, (FileExistsError, "not empty")),
    Case("a file in the place of the folder", "3", a_file, (FileExistsError, "is a file")),
    Case("folders made for a run that came to nothing", "3", made_for_nothing),
]


# --- 13: no room, no right, interrupts ----------------------------------------------------------------------


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def no_room(name: str, write: Callable[[Path, int], Any]) -> Callable[[Path], bool]:
    """Without room a file that stands stays what it was, and nothing is left beside it."""

    def run(folder: Path) -> bool:
        path = folder / name
        write(path, 1)
        before = path.read_bytes()
        try:
            with room(len(before)):
                write(path, 60)
        except OSError:
            return path.read_bytes() == before and [one.name for one in folder.iterdir()] == [name]
        return False

    return run


def fits_without_room(folder: Path) -> bool:
    """Fits that find no room leave no folder that reads as whole, and are saved where there is some."""
    fits = swept([PCA(2)])
    try:
        with room(200):
            fits.save(folder / "fits")
    except OSError:
        left = list((folder / "fits").iterdir()) if (folder / "fits").exists() else []
        fits.save(folder / "elsewhere")
        return not left and len(Fits.load(folder / "elsewhere")) == 1
    return False


class Stopping(Method):
    """Interrupted at the second site that it meets."""

    label = "Stopping"

    def learner(self, problem: Problem) -> Learner:
        if problem.sites["v"] != LAST:
            raise KeyboardInterrupt
        return PCA(2).learner(problem)


def interrupted(_: Path) -> bool:
    """The sites that are finished come with the interrupt."""
    try:
        swept([Stopping()], sites=[LAST, Site("block_output", 1, "last")])
    except SweepInterrupted as error:
        return error.fits.places == [str(LAST)]
    return False


def not_there(path: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        (folder / "file").write_text("mine")
        with taken_folder(path.format(folder)):
            return "taken"

    return run


ENDINGS = [
    Case("numbers without room", "13", no_room("a.json", lambda path, n: write_json(path, ["number"] * n))),
    Case("text without room", "13", no_room("a.md", lambda path, n: write_text(path, "text" * n))),
    Case(
        "weights without room",
        "13",
        no_room("a.safetensors", lambda path, n: save_edits(path, {SITE: loreft(8 * n, 2, seed=0)})),
    ),
    Case("fits without room", "13", fits_without_room),
    Case("an interrupt between two sites", "13", interrupted),
    Case("a folder inside a file", "13", not_there("{}/file/out"), (OSError, "cannot be written to")),
    Case("a folder where none can be made", "13", not_there("/proc/out"), (OSError, "cannot be written to")),
    Case("a name that is too long", "13", not_there("{}/" + 300 * "a"), (OSError, "cannot be written to")),
    Case(
        "a number that JSON has not",
        "13",
        lambda folder: write_json(folder / "a.json", float("nan")) or "written",
        (ValueError, "JSON"),
    ),
    Case(
        "half a file of weights",
        "13",
        lambda folder: (
            save_edits(folder / "a", {SITE: loreft(8, 2, seed=0)}),
            (folder / "a").write_bytes((folder / "a").read_bytes()[:-9]),
            load_edits(folder / "a"),
        ),
        (ValueError, "not a whole safetensors file"),
    ),
]


# --- 6: texts -----------------------------------------------------------------------------------------------

WORDS = ("▁the", "▁girl", "▁boy", "▁smiled", "▁she", "▁he", "he", "▁Paris", "Rome", "▁")


def pieces(words: Sequence[str] = WORDS, template: str = "<s> $A") -> Any:
    """A tokenizer whose pieces carry the space before them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    table = [(piece, float(len(piece))) for piece in ("<unk>", "<s>", "</s>", *words)]
    inner = Tokenizer(models.Unigram(table, unk_id=0))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Metaspace()
    marks = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def of_texts(base: str = "the girl", source: str = "the boy", tokenizer: Any = None, **options: Any) -> Any:
    return from_texts(
        tokenizer or pieces(), base=[base], source=[source], answer=["he"], base_answer=["she"], **options
    )


def tokens(made: Any) -> list[str]:
    real = made.base.inputs["attention_mask"][0].bool()
    found: list[str] = pieces().convert_ids_to_tokens(made.base.inputs["input_ids"][0][real])
    return found


def alike(_: Path) -> bool:
    return pieces().convert_ids_to_tokens(answer_tokens(pieces(), ["she", "he"])) == ["▁she", "▁he"]


def ends_with_a_mark(_: Path) -> bool:
    made = of_texts(tokenizer=pieces(template="<s> $A </s>"))
    at = made.readout.index[0, 0]
    return tokens(made)[at] == "▁girl"


def apart(_: Path) -> bool:
    made = of_texts("the girl", "smiled the boy", spans={"who": {"base": ["girl"], "source": ["boy"]}})
    at, (source,) = made.base.columns["who"], made.sources.values()
    return at.tolist() == [2] and source.columns["who"].tolist() == [3]


TEXTS = [
    Case("answers without their space", "6", alike),
    Case(
        "answers of one token and of two",
        "6",
        lambda _: (
            answer_tokens(pieces([*WORDS, *dict.fromkeys("▁.ParisRome")]), ["Paris", "Rome"]).shape == (2, 2)
        ),
    ),
    Case("a text with its mark", "6", lambda _: tokens(of_texts("<s> the girl")).count("<s>") == 1),
    Case("no marks", "6", lambda _: "<s>" not in tokens(of_texts(add_special_tokens=False))),
    Case("a tokenizer that ends texts", "6", ends_with_a_mark),
    Case("a span that moves", "6", apart),
    Case(
        "a span of one side",
        "6",
        lambda _: of_texts(spans={"who": {"base": ["girl"]}}),
        (ValueError, "missing are"),
    ),
    Case(
        "a difference that there is not",
        "6",
        lambda _: of_texts("the girl", "the girl", spans={"who": "difference"}),
        (ValueError, "No word differs"),
    ),
    Case(
        "rows of another format",
        "20",
        lambda _: encode(Dataset.from_list([{"base": "the girl"}]), pieces(), ["he"]),
        (ValueError, "this one lacks"),
    ),
    Case(
        "a rank above a width that a run shows",
        "21",
        lambda _: search(
            chain(),
            Pairs(of_numbers(0), of_numbers(1), of_numbers(2)),
            [Site("1.output")],
            methods=[DAS(9)],
            quiet=True,
        ),
        (ValueError, "possible are 1 to 7"),
    ),
]

CASES: list[Case] = [*FOLDERS, *ENDINGS, *TEXTS]
