"""Edits and subspaces on disk: bit-equal in another process, whole or refused, old file or new."""

from __future__ import annotations

import copy
import inspect
import json
import os
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import subspace_lab
from subspace_lab.core import files
from subspace_lab.core.checkpoints import load_edits, load_subspaces, save_edits, save_subspaces
from subspace_lab.core.dictionaries import Dictionary
from subspace_lab.core.files import read_json, write_json
from subspace_lab.core.interventions import (
    Intervention,
    consreft,
    direft,
    full_vector,
    interchange,
    lobireft,
    loreft,
    mean_ablation,
    noreft,
    red,
    set_to,
    steer,
    zero_ablation,
)
from subspace_lab.core.kinds import Kind
from subspace_lab.core.masks import Boundaries, Gates, Masked
from subspace_lab.core.nonlinear import InvertibleMap
from subspace_lab.core.parts import PartedSubspace
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, LearnedSubspace, Subspace, pca, random_subspace
from subspace_lab.core.values import Affine, ByPart, Source, Value

WIDTH = 12
SITE = Site("block_output", 3, "f2+l1")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parted() -> Intervention:
    return interchange(LearnedSubspace(WIDTH, 6, seed=5).partition({"left": 2, "right": 3}))


def by_part() -> Intervention:
    """LoReFT in three parts of one basis, of which two are trained and two are in use."""
    sizes = {"one": 3, "two": 2, "three": 1}
    basis = PartedSubspace(WIDTH, sizes, seed=4, moving=["one", "three"])
    values = {name: Affine(WIDTH, size, seed=size) for name, size in sizes.items()}
    edit: Any = Intervention(basis, ByPart(values, sizes, in_use=["three", "one"]))
    edit.subspace.raw["two"].requires_grad_(False)  # its vectors are taken as they are, so they must not move
    return edit


EVERY: dict[str, Callable[[], Intervention]] = {
    "interchange": lambda: interchange(LearnedSubspace(WIDTH, 3, seed=1)),
    "interchange, polar": lambda: interchange(LearnedSubspace(WIDTH, 3, seed=1, orthonormalise="polar")),
    "interchange, fixed": lambda: interchange(random_subspace(WIDTH, 3, 1)),
    "interchange, part": lambda: interchange(LearnedSubspace(WIDTH, 4, seed=1).partition({"a": 1, "b": 2})["b"]),
    "interchange, float64": lambda: interchange(LearnedSubspace(WIDTH, 3, seed=1).double()),
    "variables": parted,
    "parts": by_part,
    "boundary": lambda: Intervention(LearnedSubspace(WIDTH, 5, seed=1), Masked(Boundaries(5, 1, 0.5, 0.4))),
    "gates": lambda: Intervention(Axes(WIDTH), Masked(Gates(WIDTH, 1, 0.5))),
    "invertible map": lambda: interchange(InvertibleMap(WIDTH, 3, blocks=2, hidden=5, scale=1.5, seed=1)),
    "dictionary": lambda: interchange(
        Dictionary(rows(20, WIDTH), rows(20, WIDTH, seed=5), threshold=rows(20).abs())
    ),
    "full vector": lambda: full_vector(WIDTH),
    "neurons": lambda: interchange(Axes(WIDTH, [7, 2, 11])),
    "LoReFT": lambda: loreft(WIDTH, 3, seed=1),
    "LoReFT, gelu": lambda: loreft(WIDTH, 3, seed=1, start="paper", activation="gelu", dropout=0.25),
    "NoReFT": lambda: noreft(WIDTH, 3, seed=1),
    "DiReFT": lambda: direft(WIDTH, 3, seed=1),
    "ConsReFT": lambda: consreft(WIDTH, 3, seed=1),
    "LobiReFT": lambda: lobireft(WIDTH, 3, seed=1),
    "RED": lambda: red(WIDTH),
    "steer": lambda: steer(random_subspace(WIDTH, 2, 1), rows(2)),
    "set": lambda: set_to(random_subspace(WIDTH, 2, 1), 1.5),
    "set by row": lambda: set_to(random_subspace(WIDTH, 2, 1), rows(4, 2)),
    "zero ablation": lambda: zero_ablation(pca(rows(20, WIDTH), 2)),
    "mean ablation": lambda: mean_ablation(random_subspace(WIDTH, 2, 1), rows(5, WIDTH)),
}


def made(name: str) -> Intervention:
    """Away from its start, so that no number is one that a fresh build has by itself."""
    edit = EVERY[name]().eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, edit.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return edit


def applied(edit: Intervention, h: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        if edit.needs_source:
            parts = getattr(edit.value, "parts", None)
            return edit(h, source if parts is None else {name: source * (i + 1) for i, name in enumerate(parts)})
        return edit(h)


def elsewhere(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(subspace_lab.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# --- there and back -----------------------------------------------------------------------------------------


def test_every_kind_gives_the_same_bits_in_another_process(tmp_path: Path) -> None:
    h, source = rows(4, WIDTH, seed=2), rows(4, WIDTH, seed=3)
    expected = {}
    for i, name in enumerate(EVERY):
        edit = made(name)
        expected[str(i)] = applied(edit, h, source)
        save_edits(tmp_path / f"{i}.safetensors", {SITE: edit})
        # The control: what is loaded differs from what a fresh build would give, where anything was learned.
        if any(True for _ in edit.parameters()):
            assert not torch.equal(applied(EVERY[name]().eval(), h, source), expected[str(i)]), name
    done = elsewhere(
        """
        import sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from subspace_lab.core.checkpoints import load_edits

        torch.set_num_threads(1)
        folder, count = Path(sys.argv[1]), int(sys.argv[2])
        h, source = (torch.randn(4, 12, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
        out = {}
        for i in range(count):
            ((site, edit),) = load_edits(folder / f"{i}.safetensors").items()
            assert str(site) == "block_output[3]@f2+l1", site
            edit.eval()
            parts = getattr(edit.value, "parts", None)
            given = {name: source * (j + 1) for j, name in enumerate(parts)} if parts else source
            with torch.no_grad():
                out[str(i)] = edit(h, given) if edit.needs_source else edit(h)
        save_file(out, folder / "outputs")
        """,
        tmp_path,
        len(EVERY),
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs")
    assert [name for i, name in enumerate(EVERY) if not torch.equal(found[str(i)], expected[str(i)])] == []


@pytest.mark.parametrize("name", EVERY)
def test_what_trained_trains_again_and_nothing_else(name: str, tmp_path: Path) -> None:
    edit = made(name)
    for i, p in enumerate(edit.parameters()):
        p.requires_grad_(i > 0)
    save_edits(tmp_path / "edits", {SITE: edit})
    back = load_edits(tmp_path / "edits")[SITE]
    mine, theirs = edit.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    trains = {k: p.requires_grad for k, p in edit.named_parameters()}
    assert trains == {k: p.requires_grad for k, p in back.named_parameters()}
    assert (back.write, back.dropout.p) == (edit.write, edit.dropout.p)


def every_kind(kind: type[Kind] = Kind) -> set[type[Kind]]:
    return {kind, *(found for direct in kind.__subclasses__() for found in every_kind(direct))}


def test_every_kind_of_the_package_is_among_them_and_has_a_name_of_its_own() -> None:
    ours = {kind for kind in every_kind() if kind.__module__.startswith("subspace_lab.")}
    leaves = {kind for kind in ours if not kind.__subclasses__() or kind is Intervention} - {Kind}
    leaves = {kind for kind in leaves if not inspect.isabstract(kind) and not kind.__name__.startswith("_")}
    assert {type(m) for name in EVERY for m in EVERY[name]().modules() if isinstance(m, Kind)} == leaves
    assert len({kind.__name__ for kind in ours}) == len(ours)


def test_training_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    def step(edit: Intervention) -> None:
        optimizer = torch.optim.Adam(edit.parameters(), lr=0.1)
        edit(rows(5, WIDTH)).square().sum().backward()
        optimizer.step()

    edit = made("LoReFT")
    save_edits(tmp_path / "edits", {SITE: edit})
    back = load_edits(tmp_path / "edits")[SITE]
    before = copy.deepcopy(back.state_dict())
    step(edit)
    step(back)
    assert all(
        torch.equal(a, b) for a, b in zip(edit.state_dict().values(), back.state_dict().values(), strict=True)
    )
    assert not torch.equal(before["subspace.raw"], back.state_dict()["subspace.raw"])


def test_what_is_shared_stays_shared_and_is_stored_once(tmp_path: Path) -> None:
    whole = LearnedSubspace(WIDTH, 4, seed=0)
    parts = whole.partition({"a": 2, "b": 2})
    tied = loreft(WIDTH, 2, seed=3)
    sites = [Site("block_output", layer, "last") for layer in range(6)]
    edits = dict(
        zip(
            sites,
            [
                tied,
                tied,
                interchange(parts["a"]),
                interchange(parts["b"]),
                loreft(whole),
                loreft(WIDTH, 2, seed=3),
            ],
            strict=True,
        )
    )
    save_edits(tmp_path / "edits", edits)
    back = load_edits(tmp_path / "edits")
    assert list(back) == sites
    a: Any
    tied_back, again, a, b, on_whole, alone = back.values()
    assert tied_back is again and tied_back is not alone
    assert a.subspace.whole is b.subspace.whole is on_whole.subspace
    assert a.subspace is not b.subspace and alone.subspace is not on_whole.subspace
    numbers = load_file(tmp_path / "edits")
    assert sum(t.numel() for t in numbers.values()) == sum(
        p.numel() for p in nn.ModuleList(edits.values()).parameters()
    )
    # Training one moves the other.
    with torch.no_grad():
        a.subspace.whole.raw.add_(rows(WIDTH, 4))  # type: ignore[operator]
    assert torch.equal(b.subspace.basis(), on_whole.subspace.basis()[2:])


def test_facts_are_kept_and_none_but_json_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "edits"
    save_edits(path, {SITE: made("RED")}, {"model": "gpt2", "seed": 3, "loss": [0.5]})
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["subspace_lab.edits"])
    assert told["facts"] == {"model": "gpt2", "seed": 3, "loss": [0.5]}
    before = path.read_bytes()
    for facts in ({"x": torch.zeros(2)}, {"x": float("nan")}):
        with pytest.raises((TypeError, ValueError), match="JSON"):
            save_edits(path, {SITE: made("LoReFT")}, facts)
    assert path.read_bytes() == before


# --- refused ------------------------------------------------------------------------------------------------


class Scaled(Value):
    """A value of a user's own: z = factor · D h + b."""

    def __init__(self, rank: int, factor: float = 2.0) -> None:
        super().__init__()
        self.factor, self.shift = factor, nn.Parameter(torch.zeros(rank))

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        return (self.factor - write) * subspace.read(h) + self.shift

    def description(self) -> dict[str, Any]:
        return {"rank": len(self.shift), "factor": self.factor}


class Doubling(Intervention):
    def forward(self, h: Tensor, source: Any = None) -> Tensor:
        return 2 * super().forward(h, source)


class Forgetful(Scaled):
    """Its constructor takes more than its description says."""

    def __init__(self, rank: int, factor: float = 2.0, power: int = 1) -> None:
        super().__init__(rank, factor)
        self.power = power


class Misdescribed(Scaled):
    def description(self) -> dict[str, Any]:
        return {"factor": self.factor}


def test_a_kind_of_ones_own_needs_only_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = Doubling(LearnedSubspace(WIDTH, 2, seed=0), Scaled(2, 3.0), write=False)
    with torch.no_grad():
        own.value.shift.add_(1)
    save_edits(tmp_path / "edits", {SITE: own})
    h = rows(4, WIDTH)
    for kinds in ([], [Scaled, Doubling]):
        back = load_edits(tmp_path / "edits", kinds=kinds)[SITE]
        assert type(back) is Doubling and type(back.value) is Scaled and torch.equal(back(h), own(h))
    own_kinds = [Scaled, Doubling]
    # Where the module is not imported, or no longer has the class, the class must be passed in.
    for change in (
        lambda m: m.delitem(sys.modules, __name__),
        lambda m: m.delattr(sys.modules[__name__], "Scaled"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(ValueError, match=r"is a class of the module .* kinds=\[(Scaled|Doubling)\]"):
                load_edits(tmp_path / "edits")
            assert torch.equal(load_edits(tmp_path / "edits", kinds=own_kinds)[SITE](h), own(h))


def test_a_file_makes_no_module_be_imported(tmp_path: Path) -> None:
    save_edits(tmp_path / "edits", {SITE: Doubling(random_subspace(WIDTH, 2, 0), Scaled(2))})
    for module, name in (("antigravity", "fly"), ("json", "loads"), ("os", "system"), ("tests.nowhere", "Scaled")):
        rewritten(tmp_path / "edits", lambda told, _: told["parts"]["2"].update(module=module, kind=name))  # noqa: B023
        with pytest.raises(ValueError, match=f"'{name}' is a class of the module '{module}'"):
            load_edits(tmp_path / "edits")
    assert "antigravity" not in sys.modules


def test_what_could_not_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    def holding(value: Value) -> Intervention:
        return Intervention(random_subspace(WIDTH, 2, 0), value)

    with pytest.raises(TypeError, match="Forgetful cannot be saved: it has an __init__ of its own"):
        save_edits(tmp_path / "edits", {SITE: holding(Forgetful(2))})
    with pytest.raises(TypeError, match="Misdescribed cannot be saved, since its description"):
        save_edits(tmp_path / "edits", {SITE: holding(Misdescribed(2))})
    strange = holding(Scaled(2))
    strange.value = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Identity cannot be saved: it is no subspace, value or intervention"):
        save_edits(tmp_path / "edits", {SITE: strange})
    one, other = interchange(LearnedSubspace(WIDTH, 2, seed=0)), interchange(LearnedSubspace(WIDTH, 2, seed=1))
    other.subspace.raw = one.subspace.raw
    with pytest.raises(TypeError, match="share the module"):
        save_edits(tmp_path / "edits", {SITE: one, SITE.at("last"): other})
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """The file with a changed description or changed numbers."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described, tensors = json.loads(metadata["subspace_lab.edits"]), load_file(path)
    change(described, tensors)
    save_file(tensors, path, metadata={**metadata, "subspace_lab.edits": json.dumps(described)})


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "another format": (lambda told, _: told.update(format=99), "format 99; this version reads 1"),
    "an unknown kind": (lambda told, _: told["parts"]["0"].update(kind="Spline"), "'Spline' is not a kind"),
    "another width": (lambda told, _: told["parts"]["0"].update(width=13), "size mismatch"),
    "a rank too large": (lambda told, _: told["parts"]["0"].update(rank=40), "rank 40"),
    "a missing number": (lambda _, numbers: numbers.pop("0.raw"), r"has \['raw'\], the file \[\]"),
    "a number too many": (lambda _, numbers: numbers.update({"0.more": torch.ones(1)}), "more"),
    "numbers of nothing": (lambda _, numbers: numbers.update({"7.raw": torch.ones(1)}), "belong to nothing"),
    "no edit of that name": (lambda told, _: told["edits"][0].update(edit="9"), "KeyError: '9'"),
    "a part that is no edit": (
        lambda told, _: told["edits"][0].update(edit="0"),
        "LearnedSubspace; needed is a Intervention",
    ),
    "no site": (lambda told, _: told["edits"][0].update(site="nowhere"), "nowhere"),
    "no list of edits": (lambda told, _: told.pop("edits"), "KeyError: 'edits'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_does_not_fit_itself_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "edits"
    save_edits(path, {SITE: made("LoReFT")})
    rewritten(path, lambda *_: None)
    load_edits(path)  # the control: rewritten as it was it loads
    rewritten(path, CHANGES[change][0])
    with pytest.raises(ValueError, match=f"(?s){path} cannot be read.*{CHANGES[change][1]}"):
        load_edits(path)


@pytest.mark.parametrize("load", [load_edits, load_subspaces])
def test_missing_and_broken_files_are_named(load: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "edits"
    with pytest.raises(FileNotFoundError, match=str(path)):
        load(path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load(tmp_path)
    save_edits(path, {SITE: made("LoReFT")})
    whole = path.read_bytes()
    for broken in (b"", b"not at all", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{path} is not a whole safetensors file"):
            load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": rows(3, WIDTH)}, path)
    with pytest.raises(ValueError, match="holds no edits"):
        load_edits(path)
    with pytest.raises(ValueError, match=r"holds no subspaces.*not orthonormal"):
        load_subspaces(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path, opened = tmp_path / "edits", tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (opened,)

    torch.save({"edit": Trap()}, path)
    for load in (load_edits, load_subspaces):
        with pytest.raises(ValueError, match="not a whole safetensors"):
            load(path)
    assert not opened.exists()
    torch.load(path, weights_only=False)
    assert opened.exists()  # the trap works


# --- whole or not at all ------------------------------------------------------------------------------------


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "edits"
    save_edits(path, {SITE: made("LoReFT")})
    before = path.read_bytes()
    done = elsewhere(
        """
        import os, signal, sys
        from subspace_lab.core import checkpoints, files
        from subspace_lab.core.interventions import red
        from subspace_lab.core.sites import Site

        def kill(aside, path):
            print(aside, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        files.os.replace = kill
        checkpoints.save_edits(sys.argv[1], {Site("block_output", 0): red(4)})
        """,
        path,
    )
    assert done.returncode == -9, done.stderr
    aside = Path(done.stdout.strip())
    assert aside.parent == tmp_path and load_edits(aside)  # the new one was whole, under its provisional name
    assert path.read_bytes() == before
    assert list(load_edits(path)) == [SITE]


def test_a_failure_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "edits"
    save_edits(path, {SITE: made("LoReFT")})
    write_json(tmp_path / "facts.json", {"a": 1})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors: Any, aside: Path, metadata: Any) -> None:
        aside.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_edits(path, {SITE: made("RED")})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "facts.json", {"a": float("nan")})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_others_may_read_what_they_may_read_beside_it(tmp_path: Path) -> None:
    write_json(tmp_path / "beside.json", {})
    save_subspaces(tmp_path / "found.safetensors", {"a": random_subspace(WIDTH, 2, 0)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_json_comes_back_or_is_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"site": "block_output[3]@last", "Δ": [1.5, None]})
    assert read_json(path) == {"site": "block_output[3]@last", "Δ": [1.5, None]}
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=f"{path} is not JSON"):
        read_json(path)


# --- files of version 0.1 ------------------------------------------------------------------------------------

OLD = Path(__file__).parent / "fixtures" / "version_0_1"


def test_edits_of_version_0_1_load_to_the_bit_and_do_the_same() -> None:
    maker = runpy.run_path(str(OLD / "make.py"))
    back, numbers, outputs = (
        load_edits(OLD / "edits.safetensors"),
        load_file(OLD / "edits.safetensors"),
        load_file(OLD / "edits_outputs.safetensors"),
    )
    assert len(back) == 20 and {str(site) for site in back} == set(outputs)
    for site, edit in back.items():
        torch.testing.assert_close(maker["applied"](edit.eval()), outputs[str(site)], atol=1e-6, rtol=1e-6)
    # Every number of the file is one of the edits', bit for bit.
    ours = sorted(t.detach().double().flatten().tolist() for e in back.values() for t in e.state_dict().values())
    theirs = sorted(t.double().flatten().tolist() for t in numbers.values())
    assert ours == theirs


def test_subspaces_of_version_0_1_load_to_the_bit() -> None:
    back, numbers = load_subspaces(OLD / "subspaces.safetensors"), load_file(OLD / "subspaces.safetensors")
    assert set(back) == {f"block_output[1]@all/{name}" for name in ("a", "b", "axes")}
    assert all(torch.equal(back[name].basis(), basis) for name, basis in numbers.items())


# --- subspaces and folders ----------------------------------------------------------------------------------


def test_subspaces_come_back_as_values(tmp_path: Path) -> None:
    whole = LearnedSubspace(WIDTH, 4, seed=0)
    with torch.no_grad():
        whole.raw.add_(rows(WIDTH, 4))
    given = {"left": whole.partition({"a": 2, "b": 2})["b"], "axes": Axes(WIDTH, [3, 1]), "whole": whole}
    save_subspaces(tmp_path / "found", given, {"site": "block_output[3]@last"})
    back = load_subspaces(tmp_path / "found")
    assert back.keys() == given.keys()
    for name, subspace in given.items():
        assert type(back[name]) is FixedSubspace
        assert torch.equal(back[name].basis(), subspace.basis())
        h = rows(3, WIDTH)
        torch.testing.assert_close(back[name].read(h), subspace.read(h))
    assert not torch.equal(back["left"].basis(), whole.basis()[:2])
    with safe_open(tmp_path / "found", "pt") as file:
        assert file.metadata()["site"] == "block_output[3]@last"
