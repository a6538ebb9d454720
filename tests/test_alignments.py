"""Alignments: what they hold, do, save and claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.checkpoints import load_edits, load_subspaces, save_edits, save_subspaces
from subspace_lab.core.interventions import interchange, loreft, zero_ablation
from subspace_lab.core.parts import joined
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, LearnedSubspace, Part, random_subspace
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect, forward

WIDTH = 12
LOW, HIGH = Site("block_output", 1, "last"), Site("mlp_output", 2, "f2")
FACTS = {
    "method": "DAS",
    "seed": 3,
    "model": "gpt2",
    "task": "gender",
    "data": "sha256:12ab",
    "scores": {"iia": {"value": 0.93, "low": 0.9, "high": 0.95, "n": 400}, "loss": 0.25},
    "controls": {"random subspace": {"iia": {"value": 0.51, "low": 0.46, "high": 0.56, "n": 400}}},
    "baselines": {"difference of means": {"iia": {"value": 0.85, "low": 0.81, "high": 0.88, "n": 400}}},
}


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_here_one_there() -> Alignment:
    """Two variables that a search found one by one at one site, and one at another site."""
    whole = random_subspace(WIDTH, 5, 0).basis()
    return Alignment(
        {
            "gender": (LOW, FixedSubspace(whole[:2])),
            "number": (HIGH, random_subspace(WIDTH, 3, 1)),
            "tense": (LOW, FixedSubspace(whole[2:5])),
        },
        FACTS,
    )


# --- what it holds ------------------------------------------------------------------------------------------


def test_variables_sites_and_subspaces() -> None:
    alignment = two_here_one_there()
    assert alignment.sites == (LOW, HIGH)
    assert alignment.site("number") == HIGH and alignment.subspace("number").rank == 3
    assert list(alignment.at(LOW)) == ["gender", "tense"] and list(alignment.at(HIGH)) == ["number"]
    one = alignment.only("tense")
    assert list(one.variables) == ["tense"] and one.facts == alignment.facts
    assert one.site() == LOW and torch.equal(one.subspace().basis(), alignment.subspace("tense").basis())
    for ask in (alignment.site, alignment.subspace, alignment.only("gender", "number").site):
        with pytest.raises(ValueError, match=r"variable=None; this alignment has the variables \['gender', 'n"):
            ask()
    with pytest.raises(ValueError, match="variable='age'"):
        alignment.only("age")
    with pytest.raises(ValueError, match=r"No variable at block_output\[0\]@all; the sites are"):
        alignment.at(Site("block_output", 0))


def test_it_is_a_value() -> None:
    learned = LearnedSubspace(WIDTH, 2, seed=0)
    facts: dict[str, Any] = {"scores": {"iia": 0.5}, "sizes": (1, 2)}
    alignment = Alignment({"v": (LOW, learned)}, facts)
    before = alignment.subspace().basis().clone()
    with torch.no_grad():
        learned.raw.add_(1)
    facts["scores"]["iia"] = 1.0
    assert torch.equal(alignment.subspace().basis(), before) and not list(alignment.subspace().parameters())
    assert alignment.facts == {"scores": {"iia": 0.5}, "sizes": [1, 2]}
    edit: Any = alignment.edits()[LOW].double()
    edit.subspace.vectors.zero_()
    assert (
        torch.equal(alignment.subspace().basis(), before) and alignment.subspace().basis().dtype == torch.float32
    )


def test_repr_is_a_line_or_two() -> None:
    assert repr(Alignment({"v": (LOW, Axes(WIDTH))})) == "Alignment(v: block_output[1]@last, rank 12 of 12)"
    shown = repr(two_here_one_there()).splitlines()
    assert shown[0].startswith(
        "Alignment(gender: block_output[1]@last, rank 2 of 12; number: mlp_output[2]@f2, rank 3"
    )
    assert shown[1] == "  DAS, gpt2, gender, seed 3, iia 0.93 [0.9, 0.95], n = 400, loss 0.25"
    many = Alignment({f"v{i}": (LOW, random_subspace(WIDTH, 1, i)) for i in range(7)})
    assert repr(many).endswith("; and 4 more)")


# --- what it does -------------------------------------------------------------------------------------------


def test_edits_of_several_variables_swap_each_from_its_own_source() -> None:
    """In float64: each variable's coordinates become its source's, everything orthogonal stays the base's."""
    alignment = two_here_one_there()
    edits = alignment.edits()
    assert list(edits) == [LOW, HIGH] and edits[HIGH].value.parts is None
    h, one, other = states(4, WIDTH, seed=2), states(4, WIDTH, seed=3), states(4, WIDTH, seed=4)
    edited = edits[LOW].double()(h.double(), {"gender": one.double(), "tense": other.double()})
    gender, tense = (alignment.subspace(n).basis().double() for n in ("gender", "tense"))
    for basis, source in ((gender, one), (tense, other)):
        torch.testing.assert_close(edited @ basis.T, source.double() @ basis.T, atol=1e-6, rtol=0)
    rest = torch.eye(WIDTH, dtype=torch.float64) - gender.T @ gender - tense.T @ tense
    torch.testing.assert_close(edited @ rest, h.double() @ rest, atol=1e-6, rtol=0)
    # The order of the variables does not matter, and one left out stays the base's.
    swapped = Alignment(dict(reversed(list(alignment.variables.items())))).edits()[LOW]
    found = swapped(h, {"tense": other})
    torch.testing.assert_close(found @ gender.float().T, h @ gender.float().T, atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ tense.float().T, other @ tense.float().T, atol=1e-5, rtol=0)


def test_edits_by_another_maker() -> None:
    alignment = two_here_one_there().only("number")
    h = states(4, WIDTH)
    zeroed = alignment.edits(zero_ablation)[HIGH](h)
    torch.testing.assert_close(alignment.subspace().read(zeroed), torch.zeros(4, 3), atol=1e-6, rtol=0)
    trained = alignment.edits(loreft)[HIGH]
    assert torch.equal(trained(h), h) and {n for n, _ in trained.named_parameters()} == {
        "value.weight",
        "value.bias",
    }


def test_it_runs_in_a_model_and_reads_what_collect_gives() -> None:
    lab, batch = Backbone(build("llama")), inputs("llama", lengths=(9, 5, 7))
    source = inputs("llama", lengths=(9, 5, 7), seed=1)
    whole = random_subspace(32, 3, 0).basis()
    alignment = Alignment(
        {
            "a": (LOW, FixedSubspace(whole[:1])),
            "b": (LOW, FixedSubspace(whole[1:])),
            "c": (Site("block_output", 2), Axes(32, [3, 1])),
        }
    )
    base, other = collect(lab, batch, alignment.sites), collect(lab, source, alignment.sites)
    read = alignment.read(base)
    assert {name: tuple(z.shape) for name, z in read.items()} == {"a": (3, 1, 1), "b": (3, 1, 2), "c": (3, 9, 2)}
    torch.testing.assert_close(read["b"], base[LOW] @ whole[1:].T)
    by_hand = base[Site("block_output", 2)][..., [3, 1]]  # NaN where a row has no such position
    torch.testing.assert_close(read["c"], by_hand, rtol=0, atol=0, equal_nan=True)
    sources: dict[Site, Any] = {
        LOW: {"a": other[LOW], "b": base[LOW]},
        Site("block_output", 2): other[Site("block_output", 2)],
    }
    with torch.no_grad():
        plain = lab.model(**batch).logits
        edited = forward(lab, batch, alignment.edits(), sources=sources).logits
        same = forward(lab, batch, alignment.only("a", "b").edits(), sources={LOW: dict.fromkeys("ab", base[LOW])})
    assert (edited - plain).abs().max() > 1e-3
    torch.testing.assert_close(same.logits, plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"No states at block_output\[1\]@last, where 'a' is"):
        alignment.read({})
    with pytest.raises(ValueError, match="have width 5; 'a' was found in width 32"):
        alignment.read(dict.fromkeys(alignment.sites, states(3, 5)))


# --- parts of one basis -------------------------------------------------------------------------------------


def test_found_subspaces_are_joined_to_the_bit() -> None:
    whole = random_subspace(WIDTH, 5, 0).basis()
    found = {"b": FixedSubspace(whole[3:5]), "a": FixedSubspace(whole[:3])}
    parts = joined(found)
    assert all(isinstance(p, Part) for p in parts.values()) and parts["a"].whole is parts["b"].whole
    assert all(torch.equal(parts[name].basis(), found[name].basis()) for name in found)
    learned = LearnedSubspace(WIDTH, 5, seed=0).partition({"a": 2, "b": 3})
    again = joined({"b": learned["b"], "a": learned["a"]})
    assert again["a"] is learned["a"] and list(again) == ["a", "b"]
    axes = joined({"a": Axes(2000, [5]), "rest": Axes(2000, [i for i in range(2000) if i != 5])})
    assert sum(t.numel() for t in axes["a"].whole.state_dict().values()) == 2000
    torch.testing.assert_close(axes["a"].read(states(2, 2000)), states(2, 2000)[:, [5]])
    with_axis = joined({"a": Axes(WIDTH, [0]), "b": FixedSubspace(torch.eye(WIDTH)[3:5])})
    assert torch.equal(with_axis["b"].basis(), torch.eye(WIDTH)[3:5])


def test_two_variables_in_axes_are_swapped_without_a_square_matrix() -> None:
    width = 30_000  # of which a square matrix would have 3.6 GB
    h, one, other = states(2, width), states(2, width, seed=1), states(2, width, seed=2)
    edit = interchange({"a": Axes(width, range(10)), "rest": Axes(width, range(10, width))})
    found = edit(h, {"a": one, "rest": other})
    torch.testing.assert_close(found, torch.cat([one[:, :10], other[:, 10:]], 1))


@pytest.mark.parametrize(
    ("subspaces", "message"),
    [
        (
            lambda: {"a": random_subspace(WIDTH, 2, 0), "b": random_subspace(WIDTH, 2, 1)},
            r"'a' and 'b' are not orthogonal: the largest cosine .* is 0\.\d+, at most 0\.0001",
        ),
        (
            lambda: {"x": Axes(WIDTH, [0]), "y": Axes(WIDTH, [1]), "z": Axes(WIDTH, [2, 0])},
            "'x' and 'z' are not orthogonal: .* is 1,",
        ),
        (
            lambda: {"x": Axes(WIDTH), "y": FixedSubspace(torch.eye(WIDTH)[:2])},
            "'x' and 'y' are not orthogonal: .* is 1,",
        ),
        (lambda: {"a": Axes(WIDTH, [0]), "b": Axes(5, [1])}, r"different widths \{'a': 12, 'b': 5\}"),
        (lambda: {"a": LearnedSubspace(WIDTH, 2, seed=0)}, "learned, so they must be parts of one basis"),
    ],
)
def test_what_is_no_set_of_parts_is_refused(subspaces: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interchange(subspaces())


def test_slightly_tilted_subspaces_are_refused_at_the_bound() -> None:
    for angle, orthogonal in ((5e-5, True), (2e-4, False)):
        tilted = torch.zeros(1, WIDTH)
        tilted[0, 0], tilted[0, 1] = torch.sin(torch.tensor(angle)), torch.cos(torch.tensor(angle))
        found = Alignment({"a": (LOW, Axes(WIDTH, [0])), "b": (LOW, FixedSubspace(tilted))})
        if orthogonal:
            found.edits()
        else:
            with pytest.raises(ValueError, match=r"'a' and 'b' are not orthogonal.* is 0\.0002"):
                found.edits()
        found.only("a").edits()  # each alone can always be edited


# --- files --------------------------------------------------------------------------------------------------


def test_it_comes_back_the_same_to_the_bit(tmp_path: Path) -> None:
    alignment = two_here_one_there()
    wide = Alignment({**alignment.variables, "all": (Site("block_output", 0), Axes(5000))}, alignment.facts)
    wide.save(tmp_path / "deeper" / "found")
    back = Alignment.load(tmp_path / "deeper" / "found")
    assert list(back.variables) == list(wide.variables) and back.facts == wide.facts == FACTS
    for name, (site, subspace) in wide.variables.items():
        assert back.site(name) == site and type(back.subspace(name)) is type(subspace)
        mine, theirs = subspace.state_dict(), back.subspace(name).state_dict()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert (tmp_path / "deeper" / "found").stat().st_size < 60_000  # axes are indices
    assert back == wide


def test_alignments_are_equal_if_their_content_is() -> None:
    basis = torch.eye(WIDTH, dtype=torch.float64)[:2]
    one = Alignment({"v": (LOW, FixedSubspace(basis))}, {"seed": 0})
    assert one == Alignment({"v": (LOW, FixedSubspace(basis.clone()))}, {"seed": 0})
    nearly = basis.clone()
    nearly[0, 3] = 1e-9
    others = [
        Alignment({"w": (LOW, FixedSubspace(basis))}, {"seed": 0}),
        Alignment({"v": (HIGH, FixedSubspace(basis))}, {"seed": 0}),
        Alignment({"v": (LOW, FixedSubspace(basis))}, {"seed": 1}),
        Alignment({"v": (LOW, FixedSubspace(nearly))}, {"seed": 0}),
        Alignment({"v": (LOW, FixedSubspace(basis.float()))}, {"seed": 0}),
        Alignment({"v": (LOW, FixedSubspace(basis[:1]))}, {"seed": 0}),
        Alignment({"v": (LOW, Axes(WIDTH, [0, 1]))}, {"seed": 0}),
    ]
    assert all(one != other for other in others) and one != "v"
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_files_that_are_no_alignment_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=str(path)):
        Alignment.load(path)
    save_subspaces(path, {"a": random_subspace(WIDTH, 2, 0)})
    with pytest.raises(ValueError, match=r"no alignment: .*\['a'\].*Read them with load_subspaces"):
        Alignment.load(path)
    old = Path(__file__).parent / "fixtures" / "version_0_1"
    with pytest.raises(ValueError, match="Read them with load_subspaces"):
        Alignment.load(old / "subspaces.safetensors")
    with pytest.raises(ValueError, match="it holds edits, which load_edits reads"):
        Alignment.load(old / "edits.safetensors")
    save_edits(path, {LOW: loreft(WIDTH, 2, seed=0)})
    with pytest.raises(ValueError, match="it holds edits, which load_edits reads"):
        Alignment.load(path)
    with pytest.raises(ValueError, match="read it with load_edits"):
        load_subspaces(path)
    save_file({"bias": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"it was not written by Alignment\.save"):
        Alignment.load(path)
    two_here_one_there().save(path)
    with pytest.raises(ValueError, match=r"read it with Alignment\.load"):
        load_edits(path)
    with pytest.raises(ValueError, match=r"read it with Alignment\.load"):
        load_subspaces(path)
    whole = path.read_bytes()
    for broken in (b"", b"nothing", whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Alignment.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.update(format=2), "format 2; this version reads 1: install a newer subspace_lab"),
        (lambda told: told["parts"]["0"].update(kind="Spline"), "install a newer subspace_lab"),
        (lambda told: told["variables"][0].update(site="nowhere"), "nowhere"),
        (lambda told: told["variables"].pop(0), "belong to nothing that is described"),
        (lambda told: told.pop("facts"), "KeyError: 'facts'"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "found"
    two_here_one_there().save(path)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["subspace_lab.alignment"])
    change(described)
    save_file(load_file(path), path, metadata={"subspace_lab.alignment": json.dumps(described)})
    with pytest.raises(ValueError, match=f"{path} cannot be read.*{message}"):
        Alignment.load(path)


# --- the Hub and the card -----------------------------------------------------------------------------------


def test_the_card_states_the_scores_with_what_they_must_be_compared_with() -> None:
    card = two_here_one_there().card()
    for line in (
        "# Alignment of gender, number, tense",
        "| gender | `block_output[1]@last` | 2 | 12 |",
        "|  | iia | loss |",
        "| this alignment | 0.93 [0.9, 0.95], n = 400 | 0.25 |",
        "| control: random subspace | 0.51 [0.46, 0.56], n = 400 |  |",
        "| baseline: difference of means | 0.85 [0.81, 0.88], n = 400 |  |",
        "- model: gpt2",
        "- data: sha256:12ab",
        "- method: DAS",
        "- seed: 3",
    ):
        assert line in card.splitlines(), line
    alone = Alignment({"v": (LOW, Axes(WIDTH))}, {"scores": {"iia": 0.9}, "controls": {}}).card()
    assert "No control and no baseline was recorded. A score says little without one beside it." in alone
    assert "claims nothing" in Alignment({"v": (LOW, Axes(WIDTH))}).card()


def test_to_the_hub_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Api:
        """A Hub that is a folder."""

        def __init__(self, token: str | None = None) -> None:
            assert token == "t"

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            assert (name, private, exist_ok) == ("me/found", True, True)
            (tmp_path / name).mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            for path in Path(folder_path).iterdir():
                (tmp_path / repo_id / path.name).write_bytes(path.read_bytes())
            return "https://address"

    def download(name: str, revision: str | None) -> str:
        assert revision == "main"
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    alignment = two_here_one_there()
    assert alignment.push_to_hub("me/found", private=True, token="t") == "https://address"
    assert {p.name for p in (tmp_path / "me/found").iterdir()} == {"README.md", "alignment.safetensors"}
    assert (tmp_path / "me/found/README.md").read_text() == alignment.card()
    back = Alignment.from_hub("me/found", revision="main")
    assert back.facts == alignment.facts
    assert torch.equal(back.subspace("tense").basis(), alignment.subspace("tense").basis())
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="neither a folder nor an alignment on the Hub"):
        Alignment.from_hub("me/nothing")


# --- wrong types: what a user without a type checker meets --------------------------------------------------

WRONG = """
import torch
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes

SITE, AXES = Site("block_output", 1), Axes(4)
CASES = [
    (lambda: Alignment([("v", SITE, AXES)]), "variables is of type list; needed is Mapping: {variable: (site, "),
    (lambda: Alignment({}), "needs at least one variable"),
    (lambda: Alignment({"v": AXES}), "Variable 'v' is Axes; needed is a pair (site, subspace)."),
    (lambda: Alignment({"v": ("block_output[1]@all", AXES)}), "The site of 'v' is of type str; needed is Site: "),
    (lambda: Alignment({"v": (SITE, torch.eye(4))}), "The subspace of 'v' is of type Tensor; needed is Subspace"),
    (lambda: Alignment({1: (SITE, AXES)}), "The variable 1 is of type int; needed is str."),
    (lambda: Alignment({"v": (SITE, AXES)}, {"x": torch.eye(2)}), "The facts of an alignment must be JSON: "),
    (lambda: Alignment({"v": (SITE, AXES)}, {"x": float("nan")}), "The facts of an alignment must be JSON: "),
    (lambda: Alignment({"v": (SITE, AXES)}).at("block_output[1]@all"), "site is of type str; needed is Site: "),
    (lambda: Alignment({"v": (SITE, AXES)}).read(torch.eye(4)), "states is of type Tensor; needed is Mapping: "),
    (lambda: interchange({"v": torch.eye(4)}), "The subspace of 'v' is of type Tensor; needed is Subspace: "),
]
for i, (call, wanted) in enumerate(CASES):
    try:
        call()
    except (TypeError, ValueError) as error:
        assert wanted in str(error), (i, str(error))
    else:
        raise AssertionError(i)
"""


def test_wrong_types_get_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
