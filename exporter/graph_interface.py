"""Reads a graph's interface: each input and output classified by name, type, shape and dataflow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.interface import GraphInput, GraphOutput, InputRole, Shape, fixed_length
from trianglemix.exporter.cache_ports import CachePort
from trianglemix.exporter.graph_roles import FLOATS, GraphRoles, rank
from trianglemix.exporter.lengths import PROMPT_LENGTH

_INTEGERS: Final = (ir.DataType.INT64, ir.DataType.INT32)
_CACHE_WORDS: Final = re.compile(
    r"past_key_values?|present_key_values?|key_values?|past|present|cache|new|next|updated|out(put)?|in(put)?"
)
_MIN_STATE_RANK: Final = 2
_SECTIONED: Final = 3  # rank of position ids [3, B, S]


@dataclass(frozen=True)
class GraphInterface:
    """All inputs and outputs, in the graph's order."""

    inputs: tuple[GraphInput, ...]
    outputs: tuple[GraphOutput, ...]


@dataclass(frozen=True)
class _Kind:
    """Inputs that are known by their names: the types and the ranks that they may have."""

    role: InputRole
    names: tuple[str, ...]
    types: tuple[ir.DataType, ...] = _INTEGERS
    ranks: tuple[int, ...] = (0, 1)


_BY_NAME: Final = (
    _Kind("token_type_ids", ("token_type_ids", "mm_token_type_ids"), ranks=(2,)),
    _Kind("cache_position", ("cache_position", "cache_positions"), ranks=(1,)),
    _Kind("num_logits_to_keep", ("num_logits_to_keep", "logits_to_keep")),
    _Kind("seqlens_k", ("seqlens_k",), ranks=(1, 2)),
    _Kind("total_length", ("total_sequence_length", "total_seq_len", "total_length")),
    _Kind("past_length", ("past_sequence_length", "past_seq_len", "past_length")),
    _Kind("use_cache_branch", ("use_cache_branch",), (ir.DataType.BOOL,)),
    _Kind("inputs_embeds", ("inputs_embeds", "input_embeds"), FLOATS, (3,)),
)


def read_interface(
    graph: ir.Graph, roles: GraphRoles, ports: Sequence[CachePort]
) -> GraphInterface:
    """The table of a graph; `ports` say which of its inputs and outputs are layers' caches."""
    by_input = {port.input: port for port in ports}
    inputs = [_input(value, graph, roles, by_input.get(str(value.name))) for value in graph.inputs]
    outputs = [_output(value, roles) for value in graph.outputs]
    taken = {value.carried_from for value in inputs}
    states = [value for value in inputs if _may_be_carried(value)]
    left = [value for value in outputs if value.role == "other" and value.name not in taken]
    pairs = _paired(graph, states, left)
    inputs = [_carried(x, pairs[x.name]) if x.name in pairs else x for x in inputs]
    return GraphInterface(tuple(inputs), tuple(_named(outputs, inputs)))


def _input(
    value: ir.Value, graph: ir.Graph, roles: GraphRoles, port: CachePort | None
) -> GraphInput:
    name = str(value.name)
    basis = GraphInput(name, "unknown", _dtype(value), _shape(value))
    if port is not None:
        return replace(
            basis,
            role="past_key" if port.is_key else "past_value",
            layer=port.layer,
            shape=_cache_shape(basis.shape, port),
            token_axis=port.token_axis,
            carried_from=port.output,
            permutation=port.permutation,
            appends=port.appends,
        )
    if value is roles.input_ids:
        return replace(basis, role="input_ids", token_axis=1)
    if value is roles.attention_mask:
        return replace(basis, role="attention_mask", token_axis=1)
    if name == PROMPT_LENGTH:
        return replace(basis, role="prompt_length")
    exact = any(x.name == "position_ids" for x in graph.inputs)  # others are an encoder's
    named = name == "position_ids" if exact else "position_ids" in name
    if value is roles.position_ids or (named and value.dtype in _INTEGERS):
        return _positions(basis)
    for kind in _BY_NAME:
        fits = value.dtype in kind.types and rank(value) in (None, *kind.ranks)
        if name in kind.names and fits:
            known = _by_name(basis, kind.role)
            if name not in graph.initializers or fixed_length((known,)) is None:
                return known
    if name in graph.initializers:  # also where its default fits, but not the tokens of a call
        return replace(basis, role="optional", batch_axis=None)
    return basis


def _positions(basis: GraphInput) -> GraphInput:
    """`[B, S]`, `[S]`, or `[sections, B, S]` whose sections are alike where all tokens are text."""
    axes = 2 if basis.shape is None else len(basis.shape)
    if axes == 1:
        return replace(basis, role="position_ids", batch_axis=None, token_axis=0)
    if axes == _SECTIONED and basis.shape is not None and isinstance(basis.shape[0], int):
        return replace(basis, role="position_ids", batch_axis=1, token_axis=2)
    return replace(basis, role="position_ids", token_axis=1) if axes == 2 else basis


def _by_name(basis: GraphInput, role: InputRole) -> GraphInput:
    if role == "cache_position":
        return replace(basis, role=role, batch_axis=None, token_axis=0)
    if role in ("token_type_ids", "inputs_embeds"):
        return replace(basis, role=role, token_axis=1)
    return replace(basis, role=role, batch_axis=0 if role == "seqlens_k" else None)


def _cache_shape(shape: Shape | None, port: CachePort) -> Shape | None:
    """The declared shape, its open head count and head size as they were measured."""
    if shape is None or len(shape) != len(port.sizes):
        return shape
    return tuple(
        size if isinstance(size, int) or known is None else known
        for size, known in zip(shape, port.sizes, strict=True)
    )


def _output(value: ir.Value, roles: GraphRoles) -> GraphOutput:
    shape = _shape(value)
    if value is roles.logits:
        return GraphOutput(str(value.name), "logits", _dtype(value), shape)
    name = str(value.name)
    hidden = "hidden_state" in name and value.dtype in FLOATS
    return GraphOutput(name, "hidden_states" if hidden else "other", _dtype(value), shape)


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


def _dtype(value: ir.Value) -> str:
    return "unknown" if value.dtype is None else str(value.dtype.numpy().name)


def _shape(value: ir.Value) -> Shape | None:
    if value.shape is None:
        return None
    return tuple(
        size if isinstance(size, int) else (None if size.value is None else str(size.value))
        for size in value.shape
    )
