"""Causal models: runs, interventions and interchanges, against direct computation and their laws."""

import inspect
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from subspace_lab.das.causal_models import CausalModel


def brackets() -> CausalModel:
    # Mechanisms are given children first, so an implementation that keeps the given order fails.
    return CausalModel(
        {
            "answer": lambda above, below: above & below,
            "below": lambda amount, upper: amount <= upper,
            "above": lambda lower, amount: lower <= amount,
        }
    )


def chain() -> CausalModel:
    """x -> a -> b -> c, with y joining at b and c, so that every variable is between others."""
    return CausalModel(
        {"a": lambda x: 2 * x + 1, "b": lambda a, y: a - 3 * y, "c": lambda b, a, y: b * b + 5 * a - y}
    )


def settings_of(*names: str) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({name: st.integers(-50, 50) for name in names})


PAIR = settings_of("x", "y")


def test_structure() -> None:
    model = brackets()
    assert set(model.inputs) == {"lower", "upper", "amount"} and model.output == "answer"
    assert set(model.variables) == {"above", "below", "answer"} and model.variables[-1] == "answer"
    assert chain().variables == ("a", "b", "c") and chain().inputs == ("x", "y")
    assert "above <- lower, amount" in repr(model) and "answer <- above, below  (output)" in str(model)


@given(settings_of("lower", "upper", "amount"))
def test_run_computes_every_variable(values: dict[str, int]) -> None:
    lower, upper, amount = values["lower"], values["upper"], values["amount"]
    above, below = lower <= amount, amount <= upper
    expected = {**values, "above": above, "below": below, "answer": above and below}
    assert brackets().run(values) == expected


@given(PAIR, st.integers(-50, 50))
def test_intervention_cuts_the_parents_and_keeps_the_rest(inputs: dict[str, int], value: int) -> None:
    values = chain().run(inputs, {"b": value})
    a = 2 * inputs["x"] + 1
    assert values == {**inputs, "a": a, "b": value, "c": value * value + 5 * a - inputs["y"]}


@given(PAIR, st.integers(-50, 50))
def test_intervening_on_an_input_is_running_with_it(inputs: dict[str, int], value: int) -> None:
    assert chain().run(inputs, {"y": value}) == chain().run({**inputs, "y": value})


@given(PAIR, st.sets(st.sampled_from(["x", "y", "a", "b", "c"])))
def test_interchange_with_itself_is_the_run(base: dict[str, int], variables: set[str]) -> None:
    assert chain().interchange(base, {name: base for name in variables}) == chain().run(base)


@given(PAIR, PAIR)
def test_interchange_of_the_output_gives_the_sources_output(base: dict[str, int], source: dict[str, int]) -> None:
    model = chain()
    assert model.interchange(base, {"c": source}) == {**model.run(base), "c": model.run(source)["c"]}


@given(PAIR, PAIR)
def test_interchange_of_all_inputs_is_the_sources_run(base: dict[str, int], source: dict[str, int]) -> None:
    assert chain().interchange(base, {"x": source, "y": source}) == chain().run(source)


@given(PAIR, PAIR, PAIR)
def test_each_variable_takes_the_value_of_its_own_source(
    base: dict[str, int], first: dict[str, int], second: dict[str, int]
) -> None:
    model = chain()
    a, b = model.run(first)["a"], model.run(second)["b"]
    expected = {**base, "a": a, "b": b, "c": b * b + 5 * a - base["y"]}
    assert model.interchange(base, {"a": first, "b": second}) == expected
    # A variable set below another one hides it wherever the first has no other way to the output.
    screened = CausalModel({"a": lambda x: x + 1, "b": lambda a: 2 * a})
    one, other, third = ({"x": pair["x"]} for pair in (base, first, second))
    assert screened.interchange(one, {"a": other, "b": third})["b"] == screened.run(third)["b"]


@given(settings_of("lower", "upper", "amount"), settings_of("lower", "upper", "amount"))
def test_exchanging_both_causes_exchanges_the_answer(base: dict[str, int], source: dict[str, int]) -> None:
    model = brackets()
    exchanged = model.interchange(base, {"above": source, "below": source})
    assert exchanged["answer"] == model.run(source)["answer"]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_a_batch_runs_as_its_rows_do(kind: Callable[..., Any]) -> None:
    columns = np.random.default_rng(0).integers(-50, 50, (2, 2, 64)).tolist()
    base, source = (dict(zip("xy", map(kind, pair), strict=True)) for pair in columns)
    batch = chain().interchange(base, {"a": source})
    for row in range(64):
        one, other = ({name: int(value[row]) for name, value in setting.items()} for setting in (base, source))
        assert {name: int(value[row]) for name, value in batch.items()} == chain().interchange(one, {"a": other})


def test_callers_mappings_stay_as_they_were() -> None:
    inputs, interventions = {"x": 1, "y": 2}, {"b": 0}
    chain().run(inputs, interventions)
    assert inputs == {"x": 1, "y": 2} and interventions == {"b": 0}


def test_mechanism_of_a_set_variable_is_not_called() -> None:
    def fails(x: Any) -> None:
        raise AssertionError("called")

    assert CausalModel({"a": fails, "b": lambda a: a + 1}).run({"x": 0}, {"a": 1})["b"] == 2


@pytest.mark.parametrize(
    ("mechanisms", "output", "error", "message"),
    [
        ({}, None, ValueError, "at least one mechanism"),
        ({"a": lambda b: b, "b": lambda a: a}, None, ValueError, "cycle"),
        ({"a": lambda a: a}, None, ValueError, "cycle"),
        ({"a": lambda x: x, "b": lambda x: x}, None, ValueError, r"ambiguous.*'a', 'b'"),
        ({"a": lambda x: x}, "x", ValueError, r"'x' is not a variable.*'a'"),
        ({"a": lambda *x: x}, None, TypeError, r"'a'.*\*x"),
        ({"a": lambda **x: x}, None, TypeError, r"'a'.*\*\*x"),
        ({"a": lambda x=1: x}, None, TypeError, r"'a'.*x=1"),
        ({"a": 3}, None, TypeError, "'a'"),
        ({"a": max}, None, TypeError, "'a'"),
    ],
)
def test_what_is_no_causal_model_is_refused(
    mechanisms: dict[str, Any], output: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CausalModel(mechanisms, output)


def test_declared_inputs_make_a_misspelt_parent_an_error() -> None:
    mechanisms: dict[str, Any] = {"above": lambda lower, amount: lower <= amount, "answer": lambda above: above}
    declared = CausalModel(mechanisms, inputs=["amount", "lower"])
    assert declared.inputs == ("amount", "lower") and declared.run({"lower": 1, "amount": 2})["answer"]
    with pytest.raises(
        ValueError, match=r"'above' has unknown parents \['lower'\]; possible .*\['amount', 'lwoer'\]"
    ):
        CausalModel(mechanisms, inputs=["amount", "lwoer"])
    with pytest.raises(ValueError, match=r"inputs \['unit'\] have a mechanism or are no variable's parent"):
        CausalModel(mechanisms, inputs=["amount", "lower", "unit"])
    with pytest.raises(ValueError, match=r"inputs \['above'\]"):
        CausalModel(mechanisms, inputs=["amount", "lower", "above"])


def test_the_graph_can_be_read() -> None:
    assert brackets().parents == {
        "below": ("amount", "upper"),
        "above": ("lower", "amount"),
        "answer": ("above", "below"),
    }
    page = CausalModel({"b": lambda a: a, "c": lambda b: b})._repr_html_()
    assert page == "<pre>inputs: a\nb &lt;- a\nc &lt;- b  (output)</pre>"


def test_output_may_be_named() -> None:
    assert CausalModel({"a": lambda x: x, "b": lambda x: x}, output="a").output == "a"


def test_wrong_inputs_and_variables_are_refused() -> None:
    model = chain()
    with pytest.raises(ValueError, match=r"missing \['y'\].*not an input \['z'\]"):
        model.run({"x": 1, "z": 2})
    with pytest.raises(ValueError, match=r"missing \[\], not an input \['a'\]"):
        model.run({"x": 1, "y": 2, "a": 3})
    with pytest.raises(ValueError, match=r"\['d'\]; possible are \['x', 'y', 'a', 'b', 'c'\]"):
        model.run({"x": 1, "y": 2}, {"d": 3})
    with pytest.raises(ValueError, match=r"unknown variables \['d'\]"):
        model.interchange({"x": 1, "y": 2}, {"d": {"x": 1, "y": 2}})
    with pytest.raises(ValueError, match="missing"):
        model.interchange({"x": 1, "y": 2}, {"a": {"x": 1}})


def test_a_run_calls_each_mechanism_once_and_looks_at_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run costs: one call for each variable that is not set, one run for each source, and no more."""
    calls: Any = []
    model = CausalModel(
        {
            "above": lambda lower, amount: calls.append("above") or lower <= amount,
            "below": lambda amount, upper: calls.append("below") or amount <= upper,
            "answer": lambda above, below: calls.append("answer") or above & below,
        }
    )
    monkeypatch.setattr(inspect, "signature", None)  # parents are found once, when the model is made
    inputs = {"lower": 1, "upper": 5, "amount": 3}
    assert model.run(inputs)["answer"] and sorted(calls) == ["above", "answer", "below"]
    calls.clear()
    assert not model.run(inputs, {"below": False})["answer"] and calls == ["above", "answer"]
    calls.clear()
    model.interchange(inputs, {"above": inputs, "below": inputs})
    assert sorted(calls) == sorted(2 * ["above", "below", "answer"] + ["answer"])
