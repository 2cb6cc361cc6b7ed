"""Reads a graph's interface: each input and output classified by name, type, shape and dataflow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.input_kinds import classify, dtype_name, shape_of
from trianglemix.exporter.graph.roles import FLOATS, GraphRoles
from trianglemix.exporter.interface.cache_ports import CachePort
from trianglemix.manifest.interface import GraphInput, GraphOutput, InputRole, Shape

_CACHE_WORDS: Final = re.compile(
    r"past_key_values?|present_key_values?|key_values?|past|present|cache|new|next|updated|out(put)?|in(put)?"
)
_MIN_STATE_RANK: Final = 2


@dataclass(frozen=True)
class GraphInterface:
    """All inputs and outputs, in the graph's order."""

    inputs: tuple[GraphInput, ...]
    outputs: tuple[GraphOutput, ...]


def input_kinds(graph: ir.Graph, roles: GraphRoles) -> dict[str, GraphInput]:
    """Every input as if it were no cache, by name."""
    return {str(value.name): classify(value, graph, roles) for value in graph.inputs}


def read_interface(
    graph: ir.Graph,
    roles: GraphRoles,
    ports: Sequence[CachePort],
    kinds: Mapping[str, GraphInput] | None = None,
) -> GraphInterface:
    """The table of a graph; `ports` say which of its inputs and outputs are layers' caches.

    `kinds`: what its inputs were in the source, where masks and rotations still told it.
    """
    by_input = {port.input: port for port in ports}
    found = {**input_kinds(graph, roles), **(kinds or {})}
    inputs = []
    for value in graph.inputs:
        name = str(value.name)
        port = by_input.get(name)
        basis = replace(found[name], shape=shape_of(value))
        inputs.append(basis if port is None else _cached(basis, port))
    outputs = [_output(value, roles) for value in graph.outputs]
    taken = {value.carried_from for value in inputs}
    states = [value for value in inputs if _may_be_carried(value)]
    left = [value for value in outputs if value.role == "other" and value.name not in taken]
    pairs = _paired(graph, states, left)
    inputs = [_carried(x, pairs[x.name]) if x.name in pairs else x for x in inputs]
    return GraphInterface(tuple(inputs), tuple(_named(outputs, inputs)))


def _cached(basis: GraphInput, port: CachePort) -> GraphInput:
    return replace(
        basis,
        role="past_key" if port.is_key else "past_value",
        layer=port.layer,
        shape=_cache_shape(basis.shape, port),
        batch_axis=0,
        token_axis=port.token_axis,
        carried_from=port.output,
        permutation=port.permutation,
        appends=port.appends,
    )


def _cache_shape(shape: Shape | None, port: CachePort) -> Shape | None:
    """The declared shape, its open head count and head size as they were measured."""
    if shape is None or len(shape) != len(port.sizes):
        return shape
    return tuple(
        size if isinstance(size, int) or known is None else known
        for size, known in zip(shape, port.sizes, strict=True)
    )


def _output(value: ir.Value, roles: GraphRoles) -> GraphOutput:
    shape = shape_of(value)
    if value is roles.logits:
        return GraphOutput(str(value.name), "logits", dtype_name(value), shape)
    name = str(value.name)
    hidden = "hidden_state" in name and value.dtype in FLOATS
    return GraphOutput(name, "hidden_states" if hidden else "other", dtype_name(value), shape)


def _may_be_carried(value: GraphInput) -> bool:
    return (
        value.role == "unknown" and value.shape is not None and len(value.shape) >= _MIN_STATE_RANK
    )


def _carried(value: GraphInput, output: GraphOutput) -> GraphInput:
    """A state, or where an open axis besides the batch's is left a cache that grows."""
    shape = value.shape or ()
    batch = _batch_axis(shape)
    open_axes = [
        axis for axis, size in enumerate(shape) if not isinstance(size, int) and axis != batch
    ]
    role: InputRole = "past" if open_axes else "state"
    axis = open_axes[0] if len(open_axes) == 1 else None
    return replace(value, role=role, batch_axis=batch, token_axis=axis, carried_from=output.name)


def _batch_axis(shape: Shape) -> int:
    """The axis called after the batch, else the first one."""
    for axis, size in enumerate(shape):
        if isinstance(size, str) and size.lower() in ("b", "batch", "batch_size"):
            return axis
    return 0


def _named(outputs: Iterable[GraphOutput], inputs: Iterable[GraphInput]) -> list[GraphOutput]:
    """The outputs that are carried, by what they are carried to."""
    to = {value.carried_from: value for value in inputs if value.carried_from is not None}
    named = []
    for output in outputs:
        value = to.get(output.name)
        if value is None:
            named.append(output)
        elif value.role == "past_key":
            named.append(replace(output, role="present_key", layer=value.layer))
        elif value.role == "past_value":
            named.append(replace(output, role="present_value", layer=value.layer))
        else:
            named.append(replace(output, role="state" if value.role == "state" else "present"))
    return named


def _paired(
    graph: ir.Graph, states: Sequence[GraphInput], outputs: Sequence[GraphOutput]
) -> dict[str, GraphOutput]:
    """The output that carries each state on: by their names, else by what is made of what."""
    pairs: dict[str, GraphOutput] = {}
    for state in states:
        alike = [x for x in outputs if _stem(x.name) == _stem(state.name) and _fits(state, x)]
        twins = [x for x in states if _stem(x.name) == _stem(state.name)]
        if len(alike) == 1 and len(twins) == 1:
            pairs[state.name] = alike[0]
    taken = {output.name for output in pairs.values()}
    rest = [output for output in outputs if output.name not in taken]
    sources = _sources(graph, {output.name for output in rest}) if len(pairs) < len(states) else {}
    known: set[str] = set()
    for output in sorted(rest, key=lambda output: len(sources.get(output.name, ()))):
        made_of = sources.get(output.name, set())
        fitting = [
            state
            for state in states
            if state.name in made_of - known and state.name not in pairs and _fits(state, output)
        ]
        if len(fitting) == 1:
            pairs[fitting[0].name] = output
        known |= made_of
    return pairs


def _stem(name: str) -> str:
    """What is left of a name without the words that tell before from after."""
    return re.sub(r"[^a-z0-9]+", ".", _CACHE_WORDS.sub("", name.lower())).strip(".")


def _fits(state: GraphInput, output: GraphOutput) -> bool:
    """Whether one may be the other a call later."""
    if state.dtype != output.dtype or state.shape is None:
        return False
    if output.shape is None:
        return True
    return len(state.shape) == len(output.shape) and all(
        not isinstance(before, int) or not isinstance(after, int) or before == after
        for before, after in zip(state.shape, output.shape, strict=True)
    )


def _sources(graph: ir.Graph, names: Iterable[str]) -> dict[str, set[str]]:
    """The graph inputs that each of these outputs is computed from."""
    wanted = set(names)
    found = {}
    for output in graph.outputs:
        if output.name in wanted:
            seen: set[ir.Value] = set()
            stack = [output]
            while stack:
                value = stack.pop()
                if value in seen:
                    continue
                seen.add(value)
                node = value.producer()
                stack += [x for x in node.inputs if x is not None] if node is not None else []
            found[str(output.name)] = {str(x.name) for x in seen if x.is_graph_input()}
    return found
