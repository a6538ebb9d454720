"""Interventions: each formula written out, its parameters counted, its start, and several variables at once."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_lab.core import interventions
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
    steering_vector,
    zero_ablation,
)
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    LearnedSubspace,
    Part,
    random_subspace,
)
from subspace_lab.core.values import ACTIVATIONS, Affine

D, K = 12, 3


def stirred(edit: Intervention | LearnedSubspace, seed: int = 0) -> Intervention | LearnedSubspace:
    """The intervention with every parameter moved off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return edit


def random_states(*shape: Any, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(raw: Tensor) -> Tensor:
    """Rows spanning what the columns of a raw matrix span, by Gram and Schmidt."""
    rows: list[Any] = []
    for column in raw.T:
        for row in rows:
            column = column - (column @ row) * row
        rows.append(column / column.norm())
    return torch.stack(rows)


# --- the table of formulas ----------------------------------------------------------------------------------


def parameters_of(edit: Intervention | LearnedSubspace) -> dict[Any, Any]:
    """Leaves of their own: {short name: value}."""
    return {
        name.split(".")[-1]: p.detach().double().clone().requires_grad_() for name, p in edit.named_parameters()
    }


def rows_of(p: dict[Any, Any]) -> Tensor:
    """D of the formulas, made from the raw parameters alone."""
    return orthonormal(p["raw"]) if "raw" in p else p["directions"]


def written(p: dict[str, Tensor], h: Tensor, source: Any) -> Tensor:
    return h + (h @ p["weight"].T + p["bias"] - h @ rows_of(p).T) @ rows_of(p)


def added(p: dict[str, Tensor], h: Tensor, source: Any) -> Tensor:
    return h + (h @ p["weight"].T + p["bias"]) @ rows_of(p)


def constant_written(p: dict[str, Tensor], h: Tensor, source: Any) -> Tensor:
    return h + (p["z"] - h @ rows_of(p).T) @ rows_of(p)


def constant_added(p: dict[str, Tensor], h: Tensor, source: Any) -> Tensor:
    return h + p["z"] @ rows_of(p)


def diagonal(p: dict[str, Tensor], h: Tensor, source: Any) -> Tensor:
    return p["scale"] * h + p["bias"]


def exchanged(p: dict[str, Tensor], h: Tensor, source: Any) -> Tensor:
    return h + (source @ rows_of(p).T - h @ rows_of(p).T) @ rows_of(p)


METHODS = {
    "interchange": (lambda: interchange(LearnedSubspace(D, K, seed=0)), exchanged, D * K),
    "loreft": (lambda: loreft(D, K, seed=0, start="paper"), written, 2 * D * K + K),
    "loreft from identity": (lambda: loreft(D, K, seed=0), written, 2 * D * K + K),
    "noreft": (lambda: noreft(D, K, seed=0, start="paper"), written, 2 * D * K + K),
    "direft": (lambda: direft(D, K, seed=0, start="paper"), added, 2 * D * K + K),
    "direft from identity": (lambda: direft(D, K, seed=0), added, 2 * D * K + K),
    "consreft": (lambda: consreft(D, K, seed=0), constant_written, D * K + K),
    "lobireft": (lambda: lobireft(D, K, seed=0), constant_added, D * K + K),
    "red": (lambda: red(D), diagonal, 2 * D),
}


@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 5, D)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_formula(method: str, shape: tuple[int, ...]) -> None:
    make, formula, parameters = METHODS[method]
    edit = stirred(make()).double()
    assert sum(p.numel() for p in edit.parameters()) == parameters
    h, source = random_states(*shape), random_states(*shape, seed=2)
    found = (edit(h, source) if edit.needs_source else edit(h)).detach()
    expected = formula(parameters_of(edit), h, source).detach()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert (found - h).abs().max() > 0.1  # an edit that does nothing agrees with no formula
    # In float32 and on a bfloat16 stream: the same, as far as these can tell.
    edit = edit.float()
    narrow = [t.bfloat16() for t in (h, source)]
    exact = [t.double() for t in narrow]
    found = edit(*narrow) if edit.needs_source else edit(narrow[0])
    expected = formula(parameters_of(edit), *exact).detach()
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() <= 0.02 * expected.abs().max()


ORACLES = {
    "linear": lambda x: x,
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_of_the_map_alone(activation: str) -> None:
    h = random_states(7, D)
    for make, write in ((loreft, True), (noreft, True), (direft, False)):
        edit = stirred(make(D, K, seed=0, start="paper", activation=activation)).double()
        p = parameters_of(edit)
        rows = rows_of(p)
        z = ORACLES[activation](h @ p["weight"].T + p["bias"])
        expected = h + (z - h @ rows.T if write else z) @ rows
        torch.testing.assert_close(edit(h), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_the_formula(method: str) -> None:
    make, formula, _ = METHODS[method]
    edit = stirred(make()).double()
    h, source, mixing = (random_states(5, D, seed=seed) for seed in (1, 2, 3))
    ((edit(h, source) if edit.needs_source else edit(h)) * mixing).sum().backward()
    p = parameters_of(edit)
    (formula(p, h, source) * mixing).sum().backward()
    for name, parameter in edit.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, p[name.split(".")[-1]].grad, atol=1e-9, rtol=1e-9)


# --- published numbers of parameters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "layers_times_groups", "edit"),
    [
        (2_097_408, 32, lambda: loreft(4096, 8, seed=0)),  # LLaMA-7B and Llama-3-8B, all layers, tied
        (3_277_120, 40, lambda: loreft(5120, 8, seed=0)),  # LLaMA-13B
        (262_176, 4 * 2, lambda: loreft(4096, 4, seed=0)),  # Llama-2-7B, layers 3;9;18;24, untied
        (18_444, 12, lambda: loreft(768, 1, seed=0)),  # RoBERTa-base
        (49_176, 24, lambda: loreft(1024, 1, seed=0)),  # RoBERTa-large
        (2_097_408, 32, lambda: direft(4096, 8, seed=0)),
        (4_097, 1, lambda: consreft(4096, 1, seed=0)),  # Alice
    ],
)
def test_published_parameter_counts(
    published: int, layers_times_groups: int, edit: Callable[..., Intervention]
) -> None:
    one = edit()
    assert layers_times_groups * sum(p.numel() for p in one.parameters() if p.requires_grad) == published
    assert sum(t.numel() for t in one.state_dict().values()) == published // layers_times_groups


# --- starts -------------------------------------------------------------------------------------------------

AT_REST = {
    "loreft": lambda: loreft(D, K, seed=0),
    "loreft, polar": lambda: loreft(LearnedSubspace(D, K, seed=0, orthonormalise="polar")),
    "loreft, full rank": lambda: loreft(D, D, seed=0),
    "loreft in a part": lambda: loreft(LearnedSubspace(D, 5, seed=0).partition({"a": 2, "b": 3})["b"]),
    "loreft on axes": lambda: loreft(Axes(D, [1, 5])),
    "noreft": lambda: noreft(D, K, seed=0),
    "direft": lambda: direft(D, K, seed=0),
    "lobireft": lambda: lobireft(D, K, seed=0),
    "red": lambda: red(D),
}


@pytest.mark.parametrize("method", AT_REST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_start_changes_no_bit(method: str, dtype: torch.dtype) -> None:
    edit, h = AT_REST[method](), 100 * random_states(6, 5, D, dtype=dtype)
    assert torch.equal(edit(h), h)
    # It can still learn: some parameter has a gradient there, and a step moves the states.
    edit(h).float().square().sum().backward()
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter -= 0 if parameter.grad is None else parameter.grad / parameter.grad.norm().clamp_min(1e-9)  # type: ignore[misc]
    assert not torch.equal(edit(h), h)


def test_the_papers_start_is_no_identity() -> None:
    h = random_states(6, D, dtype=torch.float32)
    for make in (loreft, noreft, direft):
        assert (make(D, K, seed=0, start="paper")(h) - h).abs().max() > 0.05
    assert (consreft(D, K, seed=0)(h) - h).abs().max() > 0.05  # b = 0 is an ablation
    # W as nn.Linear starts it: uniform within 1/√d
    weight = Affine(400, 200).weight.detach()
    assert weight.abs().max() <= 1 / 20 and weight.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_everything_random_comes_from_the_seed() -> None:
    make: Any
    for make in (loreft, noreft, direft):
        one, same, other = (make(D, K, seed=seed, start="paper").state_dict() for seed in (0, 0, 1))
        assert list(one) == list(same) and all(torch.equal(one[name], same[name]) for name in one)
        assert not any(torch.allclose(one[name], other[name], atol=0.01) for name in one if "bias" not in name)
    before = torch.get_rng_state()
    for make in (loreft, noreft, direft, consreft, lobireft):
        make(D, K, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    # R and W of one seed have nothing to do with each other.
    edit: Any = loreft(500, 40, seed=0, start="paper")
    together = torch.stack([edit.subspace.basis().flatten(), edit.value.weight.flatten()]).detach()
    assert abs(torch.corrcoef(together)[0, 1].item()) < 4 / (500 * 40) ** 0.5


def test_loreft_depends_on_the_span_and_not_on_its_basis() -> None:
    """R → OR, W → OW, b → Ob with O orthogonal is the same function; another span is not."""
    edit = stirred(loreft(D, K, seed=0, start="paper")).double()
    p = parameters_of(edit)
    rows = rows_of(p).detach()
    turn = random_orthonormal(K, K, 5).double()
    turn = torch.linalg.qr(turn)[0]
    turned: Any = loreft(LearnedSubspace(D, K, start=turn @ rows), start="paper").double()
    with torch.no_grad():
        turned.value.weight.copy_(turn @ p["weight"])
        turned.value.bias.copy_(turn @ p["bias"])
    h = random_states(7, D)
    torch.testing.assert_close(turned(h), edit(h), atol=1e-9, rtol=1e-9)
    assert (turned.subspace.basis() - rows).abs().max() > 0.1
    with torch.no_grad():
        turned.value.weight.copy_(p["weight"])  # W alone not turned
    assert (turned(h) - edit(h)).abs().max() > 0.1


# --- dropout ------------------------------------------------------------------------------------------------


def test_dropout_drops_coordinates_of_the_change_and_nothing_else() -> None:
    torch.manual_seed(0)
    subspace = LearnedSubspace(D, K, seed=0)
    edit = stirred(loreft(subspace, start="paper", dropout=0.5))
    plain = copy.deepcopy(edit).eval()
    h = random_states(400, D, dtype=torch.float32)
    basis = subspace.basis().detach()
    change, full = ((e(h).detach() - h) @ basis.T for e in (edit, plain))
    kept = (change - 2 * full).abs() < 1e-4
    dropped = change.abs() < 1e-4
    assert bool((kept | dropped).all()) and 0.4 < dropped.float().mean() < 0.6
    # The complement as after an edit without dropout: untouched.
    moved = edit(h).detach()
    outside = (moved - h) - ((moved - h) @ basis.T) @ basis
    assert outside.abs().max() < 1e-5 < (moved - h).abs().max()
    assert torch.equal(edit.eval()(h), plain(h))
    edit.train()
    assert not torch.equal(edit(h), plain(h))


def test_dropout_reaches_every_method() -> None:
    h = random_states(50, D, dtype=torch.float32)
    for make in (
        lambda p: loreft(D, K, seed=0, start="paper", dropout=p),
        lambda p: noreft(D, K, seed=0, start="paper", dropout=p),
        lambda p: direft(D, K, seed=0, start="paper", dropout=p),
        lambda p: consreft(D, K, seed=0, dropout=p),
        lambda p: lobireft(D, K, seed=0, dropout=p),
        lambda p: red(D, dropout=p),
    ):
        edit = stirred(make(0.5))
        assert not torch.equal(edit(h), edit(h))
        assert torch.equal(edit.eval()(h), edit(h))
        quiet = stirred(make(0.0))
        assert torch.equal(quiet(h), quiet(h))


# --- ablations, steering, full vectors ----------------------------------------------------------------------


def test_zero_and_mean_ablation() -> None:
    subspace, h = random_subspace(D, K, 0), random_states(6, 4, D, dtype=torch.float32)
    rows = subspace.basis()
    torch.testing.assert_close(zero_ablation(subspace)(h), h - (h @ rows.T) @ rows)
    states = random_states(3, 5, D, seed=4, dtype=torch.float32)
    mean = sum(states[i, j] for i in range(3) for j in range(5)) / 15
    ablated = mean_ablation(subspace, states)(h)
    torch.testing.assert_close(ablated, h + (rows @ mean - h @ rows.T) @ rows, atol=1e-5, rtol=1e-5)
    assert (ablated @ rows.T).std(dim=(0, 1)).max() < 1e-5 < (h @ rows.T).std(dim=(0, 1)).min()
    one = mean_ablation(subspace, states[0, 0])(h)
    torch.testing.assert_close(one, h + (rows @ states[0, 0] - h @ rows.T) @ rows, atol=1e-5, rtol=1e-5)
    # The mean is taken once: states that change afterwards, or a subspace that trains on, do not move it.
    learned = LearnedSubspace(D, K, seed=0)
    fixed = mean_ablation(learned, states)
    assert not fixed.value.z.requires_grad and torch.equal(fixed(h), fixed(h))


def test_steering() -> None:
    subspace, h = random_subspace(D, K, 0), random_states(6, D, dtype=torch.float32)
    amount = torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(steer(subspace, amount)(h), h + amount @ subspace.basis())
    torch.testing.assert_close(steer(subspace, 2)(h), h + 2 * subspace.basis().sum(0))
    vector = random_states(D, dtype=torch.float32)
    torch.testing.assert_close(steer(*steering_vector(vector))(h), h + vector)
    torch.testing.assert_close(set_to(subspace, amount)(h) @ subspace.basis().T, amount.expand(6, K))
    assert torch.equal(steer(subspace, 0.0)(h), h)


def test_a_coordinate_for_each_row() -> None:
    """Leading axes of z are the leading axes of the states: rows, not positions."""
    subspace = random_subspace(D, K, 0)
    rows = subspace.basis()
    for shape in ((4, D), (4, 6, D), (4, 4, D)):  # in the last, rows and positions could be confused
        h = random_states(*shape, dtype=torch.float32)
        z = torch.randn(4, K)
        for row in range(4):
            expected = h[row] + (z[row] - h[row] @ rows.T) @ rows
            torch.testing.assert_close(set_to(subspace, z)(h)[row], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(steer(subspace, z)(h)[row], h[row] + z[row] @ rows, atol=1e-5, rtol=1e-5)
    for z in (torch.randn(5, K), torch.randn(4, 5, K), torch.randn(4, 6, 2, K)):
        with pytest.raises(ValueError, match="must be the first axes of the states"):
            set_to(subspace, z)(torch.randn(4, 6, D))
    everywhere = torch.randn(4, 6, K)
    torch.testing.assert_close(
        set_to(subspace, everywhere)(torch.randn(4, 6, D)) @ rows.T, everywhere, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_vector_is_the_source_to_the_bit(dtype: torch.dtype) -> None:
    h, source = random_states(3, 4, D, dtype=dtype), 1000 * random_states(3, 4, D, seed=2, dtype=dtype)
    assert torch.equal(full_vector(D)(h, source), source)
    some = interchange(Axes(D, [2, 7]))(h, source)
    assert torch.equal(some[..., [2, 7]], source[..., [2, 7]])
    rest = [i for i in range(D) if i not in (2, 7)]
    assert torch.equal(some[..., rest], h[..., rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interchange_with_itself_changes_no_bit(dtype: torch.dtype) -> None:
    h = 100 * random_states(3, 4, D, dtype=dtype)
    for subspace in (random_subspace(D, K, 0), LearnedSubspace(D, D, seed=0), Axes(D)):
        assert torch.equal(interchange(subspace)(h, h), h)
    parts = LearnedSubspace(D, 5, seed=0).partition({"a": 2, "b": 3})
    assert torch.equal(interchange(parts)(h, {"a": h, "b": h}), h)
    assert torch.equal(interchange(parts)(h, {}), h)


# --- several variables --------------------------------------------------------------------------------------


@pytest.fixture
def two() -> tuple[Any, ...]:
    """A basis of rank 6, two of its parts (one row of it is in neither), base and two sources."""
    whole: Any = stirred(LearnedSubspace(D, 6, seed=0)).double()
    states = [random_states(5, 3, D, seed=seed) for seed in (1, 2, 3)]
    return whole, whole.partition({"a": 2, "b": 3}), *states


def test_variables_take_their_own_sources(two: tuple[Any, ...]) -> None:
    whole, parts, h, first, second = two
    rows = orthonormal(whole.raw.detach())
    change = torch.cat([(first - h) @ rows[:2].T, (second - h) @ rows[2:5].T], -1)
    found = interchange(parts)(h, {"a": first, "b": second})
    torch.testing.assert_close(found, h + change @ rows[:5], atol=1e-9, rtol=1e-9)
    # The same as one after the other, in either order; other than with the sources exchanged.
    one, other = interchange(parts["a"]), interchange(parts["b"])
    torch.testing.assert_close(found, other(one(h, first), second), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found, one(other(h, second), first), atol=1e-9, rtol=1e-9)
    assert (found - interchange(parts)(h, {"a": second, "b": first})).abs().max() > 0.1


def test_variable_without_source_stays_the_bases(two: tuple[Any, ...]) -> None:
    _, parts, h, first, _ = two
    found = interchange(parts)(h, {"b": first})
    torch.testing.assert_close(found, interchange(parts["b"])(h, first), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(parts["a"].read(found), parts["a"].read(h), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(parts["b"].read(found), parts["b"].read(first), atol=1e-9, rtol=1e-9)


def test_order_of_the_mapping_does_not_matter(two: tuple[Any, ...]) -> None:
    _, parts, h, first, second = two
    backwards = interchange(dict(reversed(parts.items())))
    sources = {"b": second, "a": first}
    torch.testing.assert_close(backwards(h, sources), interchange(parts)(h, dict(reversed(sources.items()))))


def test_variables_train_one_basis(two: tuple[Any, ...]) -> None:
    whole, parts, h, first, second = two
    edit = interchange(parts)
    assert [p is whole.raw for p in edit.parameters()] == [True]
    edit(h, {"a": first, "b": second}).square().sum().backward()
    whole_grad, whole.raw.grad = whole.raw.grad.clone(), None
    one, other = interchange(parts["a"]), interchange(parts["b"])
    other(one(h, first), second).square().sum().backward()
    torch.testing.assert_close(whole.raw.grad, whole_grad, atol=1e-8, rtol=1e-8)
    assert whole_grad.abs().max() > 0.01


# --- a guest of its arguments -------------------------------------------------------------------------------


def everything() -> list[Any]:
    whole = LearnedSubspace(D, 5, seed=0)
    edits = [stirred(make()) for make, _, _ in METHODS.values()]
    edits += [make() for make in AT_REST.values()]
    edits += [full_vector(D), zero_ablation(whole), steer(random_subspace(D, K, 0), 1.0)]
    return [*edits, interchange(whole.partition({"a": 2, "b": 3}))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_are_never_written_into(dtype: torch.dtype) -> None:
    for edit in everything():
        h, source = random_states(4, D, dtype=dtype), random_states(4, D, seed=2, dtype=dtype)
        kept = h.clone(), source.clone()
        sources = {"a": source, "b": source} if edit.needs_source and edit.value.parts else source
        found = edit(h, sources) if edit.needs_source else edit(h)
        found.data.add_(1)
        assert torch.equal(h, kept[0]) and torch.equal(source, kept[1])
        assert not isinstance(sources, dict) or list(sources) == ["a", "b"]


def test_autocast_does_not_reach_the_edit() -> None:
    h, source = random_states(6, D, dtype=torch.float32), random_states(6, D, seed=2, dtype=torch.float32)
    for edit in everything():
        args = () if not edit.needs_source else ({"a": source, "b": source} if edit.value.parts else source,)
        edit.eval()
        expected = edit(h, *args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (h @ h.T).dtype == torch.bfloat16
            found = edit(h, *args)
            half = edit(h.bfloat16(), *args)
        assert found.dtype == torch.float32 and half.dtype == torch.bfloat16
        assert torch.equal(found, expected)


def test_half_precision_model_keeps_the_edits_parameters() -> None:
    for make, _, _ in METHODS.values():
        edit = stirred(make())
        before = {name: p.clone() for name, p in edit.named_parameters()}
        parent = torch.nn.ModuleDict({"model": torch.nn.Linear(3, 3), "edit": edit}).bfloat16()
        assert parent["model"].weight.dtype == torch.bfloat16
        for name, p in edit.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, before[name]), name
    fixed: Any = steer(random_subspace(D, K, 0), torch.tensor([0.1, 0.2, 0.3])).bfloat16()
    assert fixed.value.z.dtype == torch.float32 and torch.equal(fixed.value.z, torch.tensor([0.1, 0.2, 0.3]))


def test_state_dict_brings_an_edit_back() -> None:
    for make, _, _ in METHODS.values():
        edit, other = stirred(make()), stirred(make(), seed=7)
        h, source = random_states(4, D, dtype=torch.float32), random_states(4, D, seed=2, dtype=torch.float32)
        args = (h, source) if edit.needs_source else (h,)
        assert not torch.equal(other(*args), edit(*args))
        other.load_state_dict({name: t.clone() for name, t in edit.state_dict().items()})
        assert torch.equal(other(*args), edit(*args))


def test_bf16_stream_is_untouched_outside_to_the_bit() -> None:
    basis = torch.zeros(2, D)
    basis[0, 0], basis[1, 1] = 1.0, 1.0
    h = 30 * random_states(6, D, dtype=torch.bfloat16)
    for edit in (
        stirred(loreft(FixedSubspace(basis), start="paper")),
        stirred(consreft(FixedSubspace(basis))),
        zero_ablation(FixedSubspace(basis)),
    ):
        found = edit(h)
        assert torch.equal(found[:, 2:], h[:, 2:]) and not torch.equal(found[:, :2], h[:, :2])


# --- what is refused ----------------------------------------------------------------------------------------


def parts_of_two_bases() -> dict[Any, Any]:
    one, other = (LearnedSubspace(D, 4, seed=s).partition({"a": 2, "b": 2}) for s in (0, 1))
    return {"a": one["a"], "b": other["b"]}


def parts_with_a_gap() -> dict[Any, Any]:
    parts = LearnedSubspace(D, 6, seed=0).partition({"a": 2, "skipped": 2, "b": 2})
    return {"a": parts["a"], "b": parts["b"]}


def parts_without_the_first() -> dict[Any, Any]:
    return {"b": LearnedSubspace(D, 4, seed=0).partition({"a": 2, "b": 2})["b"]}


def overlapping_parts() -> dict[Any, Any]:
    whole = LearnedSubspace(D, 4, seed=0)
    return {"a": Part(whole, 0, 3), "b": Part(whole, 2, 4)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loreft(D, K, activation="softmax", start="paper"), r"'softmax': possible are \['gelu'"),
        (lambda: loreft(D, K, activation="relu"), r"'relu' no W, b make the edit the identity: use start='paper'"),
        (lambda: noreft(D, K, activation="tanh"), r"identity"),
        (lambda: loreft(D), r"A rank is needed"),
        (lambda: consreft(D), r"A rank is needed"),
        (lambda: loreft(D, D + 1), r"rank 13"),
        (lambda: loreft(D, K, dropout=1.0), r"dropout=1.0: possible is 0 ≤ p < 1"),
        (lambda: red(D, dropout=-0.1), r"dropout=-0.1"),
        (lambda: interchange(parts_of_two_bases()), r"parts of one basis"),
        (lambda: interchange(parts_with_a_gap()), r"without gap or overlap"),
        (lambda: interchange(parts_without_the_first()), r"without gap or overlap"),
        (lambda: interchange(overlapping_parts()), r"without gap or overlap"),
        (lambda: interchange({}), r"parts of one basis"),
        (lambda: interchange({"a": LearnedSubspace(D, 2)}), r"parts of one basis"),
        (lambda: steer(random_subspace(D, K, 0), torch.ones(K + 1)), r"shape \(4,\) for a subspace of rank 3"),
        (lambda: steering_vector(torch.zeros(D)), r"length 0 has no direction"),
        (lambda: steering_vector(torch.full((D,), torch.nan)), r"no direction"),
    ],
)
def test_impossible_interventions_are_refused(make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_direft_with_an_activation_may_start_as_identity() -> None:
    """W = 0 and σ(0) = 0: DiReFT's identity start holds for all but the sigmoid."""
    h = random_states(4, D, dtype=torch.float32)
    for activation in ("linear", "relu", "gelu", "silu", "tanh"):
        assert torch.equal(direft(D, K, seed=0, activation=activation)(h), h)
    with pytest.raises(ValueError, match="start='paper'"):
        direft(D, K, seed=0, activation="sigmoid")


@pytest.mark.parametrize(
    ("edit", "args", "message"),
    [
        (lambda: loreft(D, K, seed=0), (torch.randn(2, D + 1),), r"width 13 for a subspace of width 12"),
        (lambda: interchange(random_subspace(D, K, 0)), (torch.randn(2, D),), r"needs the source's states"),
        (lambda: full_vector(D), (torch.randn(2, D),), r"needs the source's states"),
        (
            lambda: interchange(random_subspace(D, K, 0)),
            (torch.randn(2, D), torch.randn(3, D)),
            r"shape \(2, 12\), the source \(3, 12\)",
        ),
        (
            lambda: interchange(random_subspace(D, K, 0)),
            (torch.randn(2, 4, D), torch.randn(2, 1, D)),
            r"shape \(2, 4, 12\), the source \(2, 1, 12\)",
        ),
        (lambda: full_vector(D), (torch.randn(2, 4, D), torch.randn(2, 1, D)), r"the source \(2, 1, 12\)"),
        (lambda: full_vector(D), (torch.randn(2, D), torch.randn(2, D + 1)), r"the source \(2, 13\)"),
        (
            lambda: interchange(LearnedSubspace(D, 4, seed=0).partition({"a": 2, "b": 2})),
            (torch.randn(2, D), {"a": torch.randn(2, D), "c": torch.randn(2, D)}),
            r"variables \['a', 'b'\] .* found \['a', 'c'\]",
        ),
        (
            lambda: interchange(LearnedSubspace(D, 4, seed=0).partition({"a": 2, "b": 2})),
            (torch.randn(2, D), torch.randn(2, D)),
            r"variables \['a', 'b'\] .* found Tensor",
        ),
        (
            lambda: interchange(LearnedSubspace(D, 4, seed=0).partition({"a": 2, "b": 2})),
            (torch.randn(2, D), {"a": torch.randn(3, D)}),
            r"the source \(3, 12\)",
        ),
        (
            lambda: interchange(random_subspace(D, K, 0)),
            (torch.randn(2, D), {"a": torch.randn(2, D)}),
            r"needs the source's states, one tensor",
        ),
    ],
)
def test_impossible_calls_are_refused(
    edit: Callable[..., Intervention], args: tuple[Any, ...], message: str
) -> None:
    made = edit()
    assert isinstance(made, Intervention) and made.width == D
    with pytest.raises(ValueError, match=message):
        made(*args)


def test_start_is_checked_without_the_shape_checker() -> None:
    """The checker of these tests would catch a misspelt start first; users have no checker."""
    plain = inspect.unwrap(interventions._with_map)
    with pytest.raises(ValueError, match="start='zero': possible are 'identity' and 'paper'"):
        plain(FreeDirections(D, K, seed=0), "zero", "linear", 0.0, None, write=True)


def test_the_oracles_gram_schmidt() -> None:
    raw = random_states(D, K)
    rows = orthonormal(raw)
    torch.testing.assert_close(rows @ rows.T, torch.eye(K, dtype=torch.float64))
    torch.testing.assert_close(raw.T @ rows.T @ rows, raw.T)
