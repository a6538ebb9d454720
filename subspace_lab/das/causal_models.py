"""Causal models: the hypothesis that DAS tests, written as plain functions of named variables.

A variable's mechanism is a function whose parameter names are its parents. A parent without a mechanism is an input.
Values can be anything that the functions accept: Python scalars, or arrays and tensors (elementwise), so that a whole
batch is computed at once.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from html import escape
from typing import Any


def _parents(variable: str, mechanism: Callable) -> tuple[str, ...]:
    """Parameter names of `mechanism`; TypeError if one is not a plain required parameter."""
    if not callable(mechanism):
        raise TypeError(f"the mechanism of {variable!r} must be a function of its parents, found {mechanism!r}")
    try:
        parameters = inspect.signature(mechanism).parameters.values()
    except ValueError as error:
        raise TypeError(
            f"the mechanism of {variable!r}, {mechanism!r}, does not name its parameters; wrap it in a lambda"
        ) from error
    for parameter in parameters:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise TypeError(
                f"the mechanism of {variable!r} has the parameter '{parameter}'; possible are plain "
                "names without defaults, one for each parent"
            )
    return tuple(parameter.name for parameter in parameters)


class CausalModel:
    """Acyclic causal model over named variables (Geiger et al. 2021, section 2).

    `mechanisms` maps a variable to a function whose parameter names are its parents. `output` is by default the only
    variable that is not a parent of another.

    `inputs` are the names without a mechanism, `variables` the names with one, in topological order. The argument
    `inputs` is optional. With it, a misspelt parent is an error; without it, the misspelt name is one more input.

    Raises:
        TypeError: a mechanism that is not a function of plain names.
        ValueError: a cycle, no mechanism at all, an output that is unknown or ambiguous. If `inputs` are given: a
            parent that is neither an input nor a variable, or an input that has a mechanism or is no variable's parent.
    """

    inputs: tuple[str, ...]
    variables: tuple[str, ...]
    output: str

    def __init__(
        self,
        mechanisms: Mapping[str, Callable],
        output: str | None = None,
        *,
        inputs: Sequence[str] | None = None,
    ) -> None:
        if not mechanisms:
            raise ValueError("a causal model needs at least one mechanism, found none")
        parents = {variable: _parents(variable, mechanism) for variable, mechanism in mechanisms.items()}
        try:
            order = tuple(TopologicalSorter(parents).static_order())
        except CycleError as error:
            cycle = " -> ".join(error.args[1])
            raise ValueError(f"the mechanisms form a cycle, {cycle}; possible is an acyclic graph") from error

        self.variables = tuple(name for name in order if name in mechanisms)
        self.inputs = tuple(
            dict.fromkeys(name for names in parents.values() for name in names if name not in mechanisms)
        )
        if inputs is not None:
            self._declare(inputs, parents)
        childless = [name for name in self.variables if not any(name in names for names in parents.values())]
        if output is None:
            if len(childless) > 1:
                raise ValueError(
                    f"the output is ambiguous: {childless} are no variable's parents; name one as output"
                )
            output = childless[0]
        elif output not in mechanisms:
            raise ValueError(f"the output {output!r} is not a variable; possible are {list(self.variables)}")
        self.output = output
        self._input_set = frozenset(self.inputs)
        self._names = self._input_set.union(self.variables)
        # Order and parents are resolved once: a run is then one pass of positional calls.
        self._steps = tuple((name, mechanisms[name], parents[name]) for name in self.variables)

    def _declare(self, inputs: Sequence[str], parents: Mapping[str, tuple[str, ...]]) -> None:
        """Use the given inputs in the given order, after checking that they are the inputs of the mechanisms."""
        for variable, names in parents.items():
            if unknown := [name for name in names if name not in parents and name not in inputs]:
                raise ValueError(
                    f"the mechanism of {variable!r} has unknown parents {unknown}; possible are the inputs "
                    f"{list(inputs)} and the variables {list(self.variables)}"
                )
        if wrong := [name for name in inputs if name not in self.inputs]:
            raise ValueError(
                f"inputs {wrong} have a mechanism or are no variable's parent; the mechanisms have the inputs "
                f"{list(self.inputs)}"
            )
        self.inputs = tuple(dict.fromkeys(inputs))

    @property
    def parents(self) -> dict[str, tuple[str, ...]]:
        """{variable: its parents}, in topological order."""
        return {name: parents for name, _, parents in self._steps}

    def run(self, inputs: Mapping[str, Any], interventions: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The value of every variable and input; those in `interventions` are set to the given value.

        `inputs` must contain each of `self.inputs` and nothing else, otherwise ValueError. An intervention on an
        unknown variable is a ValueError too. Inputs can be intervened on.
        """
        if inputs.keys() != self._input_set:
            self._refuse_inputs(inputs)
        values = dict(inputs)
        if not interventions:
            for name, mechanism, parents in self._steps:
                values[name] = mechanism(*[values[parent] for parent in parents])
            return values
        self._check_known(interventions)
        values.update(interventions)
        for name, mechanism, parents in self._steps:
            if name not in interventions:
                values[name] = mechanism(*[values[parent] for parent in parents])
        return values

    def interchange(self, base: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Interchange intervention: run `base`, with each variable in `sources` set to its value in its source.

        `sources` maps a variable to the inputs of its source. Errors as in `run`.
        """
        self._check_known(sources)
        return self.run(base, {variable: self.run(source)[variable] for variable, source in sources.items()})

    def _check_known(self, names: Mapping[str, Any]) -> None:
        unknown = [name for name in names if name not in self._names]
        if unknown:
            raise ValueError(f"unknown variables {unknown}; possible are {[*self.inputs, *self.variables]}")

    def _refuse_inputs(self, inputs: Mapping[str, Any]) -> None:
        missing = [name for name in self.inputs if name not in inputs]
        extra = [name for name in inputs if name not in self._input_set]
        raise ValueError(f"inputs {list(self.inputs)} are needed; missing {missing}, not an input {extra}")

    def __repr__(self) -> str:
        graph = "; ".join(f"{name} <- {', '.join(parents) or 'constant'}" for name, _, parents in self._steps)
        return f"CausalModel({graph}; output: {self.output})"

    def __str__(self) -> str:
        """The graph, one line for each variable."""
        lines = [f"inputs: {', '.join(self.inputs) or 'none'}"]
        for name, _, parents in self._steps:
            mark = "  (output)" if name == self.output else ""
            lines.append(f"{name} <- {', '.join(parents) or 'constant'}{mark}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"
