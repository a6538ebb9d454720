"""Steering as a GGUF control vector: the bits that were written come back, and what is no addition is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIDTH, fresh, inputs
from torch import Tensor

from subspace_lab.core import interventions as iv
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import forward, generate
from subspace_lab.reft import ReftConfig, get_reft_model
from subspace_lab.reft.control_vectors import load_control_vector, save_control_vector

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'subspace-lab[gguf]'")


def steering() -> dict[Any, Any]:
    generator = torch.Generator().manual_seed(2)
    vectors = {layer: torch.randn(WIDTH, generator=generator) for layer in (1, -1)}
    return {Site("block_output", n): iv.steer(*iv.steering_vector(v)) for n, v in vectors.items()}


def added(edit: Intervention) -> Tensor:
    """The vector that an edit adds."""
    with torch.no_grad():
        return edit(torch.zeros(1, WIDTH))[0]


def test_what_is_written_comes_back_to_the_bit(tmp_path: Path) -> None:
    lab, edits = Backbone(fresh("llama")), steering()
    path = tmp_path / "steer.gguf"
    save_control_vector(path, edits, lab)
    assert [p.name for p in tmp_path.iterdir()] == ["steer.gguf"]
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    raw = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    expected = {f"direction.{site.layer % 3}": added(edit) for site, edit in edits.items()}
    assert list(raw) == ["direction.1", "direction.2"]
    assert all(raw[name].dtype == torch.float32 and torch.equal(raw[name], expected[name]) for name in raw)
    again = load_control_vector(path)
    assert list(map(str, again)) == ["block_output[1]@all", "block_output[2]@all"]
    assert all(torch.equal(added(edit), expected[f"direction.{site.layer}"]) for site, edit in again.items())
    given = inputs("llama")
    with torch.no_grad():
        found, wanted = (forward(lab, given, e).logits for e in (again, edits))
        assert (wanted - lab.model(**given).logits).abs().max() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_adds_is_written_as_it_generates(tmp_path: Path) -> None:
    config: dict[str, Any] = {"method": "LobiReFT", "rank": 2, "layers": (1, 2), "positions": "all"}
    model = get_reft_model(fresh("llama"), ReftConfig(**config, every_token=True))
    with torch.no_grad():
        edit: Any
        for edit in model.edits().values():
            edit.value.z.add_(2.0)
    save_control_vector(tmp_path / "lobi.gguf", model)
    given = inputs("llama")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**given, **options)
    again = load_control_vector(tmp_path / "lobi.gguf")
    assert torch.equal(generate(model.backbone, given, again, every_token=True, **options), expected)
    prompts = get_reft_model(model.unload(), ReftConfig(**config))
    with pytest.raises(ValueError, match="edit only the prompt"):
        save_control_vector(tmp_path / "prompts.gguf", prompts)


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        (Site("block_output", 0), iv.steer(random_subspace(WIDTH, 1, 1), 1.0), "no vector for block 0"),
        (Site("block_output", -3), iv.steer(random_subspace(WIDTH, 1, 1), 1.0), "no vector for block 0"),
        (
            Site("mlp_output", 1),
            iv.steer(random_subspace(WIDTH, 1, 1), 1.0),
            "can only be added to the block_output",
        ),
        (
            Site("block_output", 1, "last"),
            iv.steer(random_subspace(WIDTH, 1, 1), 1.0),
            "can only be added to the block_output",
        ),
        (Site("block_output", 1), iv.zero_ablation(random_subspace(WIDTH, 1, 1)), "more than add one vector"),
        (Site("block_output", 1), iv.red(WIDTH), "more than add one vector"),
        (
            Site("block_output", 1),
            iv.steer(random_subspace(WIDTH, 1, 1), torch.ones(3, 1)),
            "more than add one vector",
        ),
        (Site("block_output", 1), iv.loreft(WIDTH, 2, seed=1, start="paper"), "more than add one vector"),
        (Site("block_output", 1), iv.lobireft(WIDTH, 2, seed=1, dropout=0.5), "dropout=0.5"),
    ],
    ids=str,
)
def test_what_is_no_addition_is_refused(site: Site, edit: Intervention, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_control_vector(tmp_path / "x.gguf", {site: edit}, Backbone(fresh("llama")))
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_control_vector(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("a control vector")
    with pytest.raises(ValueError, match="no whole GGUF file"):
        load_control_vector(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("direction.1", torch.zeros(4).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    with pytest.raises(ValueError, match="kind 'llama'"):
        load_control_vector(tmp_path / "model.gguf")
    lab = Backbone(fresh("llama"))
    with pytest.raises(ValueError, match="0 edits"):
        save_control_vector(tmp_path / "x.gguf", {}, lab)
    one = steering()
    twice = {**one, Site("block_output", 2): next(iter(one.values()))}
    with pytest.raises(ValueError, match="3 edits of 2 layers"):
        save_control_vector(tmp_path / "x.gguf", twice, lab)
