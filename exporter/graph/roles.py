"""What the inputs and outputs of an LLM graph are for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.walk import constant_array, is_op, needed_input, optional_input

_OTHER_LOGITS: Final = re.compile(r"router|gate|mtp|medusa|draft|aux|hidden|present|past")
_OTHER_IDS: Final = re.compile(r"type|segment|pos")
INTEGERS: Final = (ir.DataType.INT64, ir.DataType.INT32)
_MATRIX: Final = 2
POSITIONS: Final = ("positions", "position", "pos_ids", "pos")
"""Other names of position_ids."""
_TOWARDS_ANGLES: Final = (
    "Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Tile", "Concat",
    "Slice", "Split", "Mul", "Div", "MatMul", "Einsum",
)  # fmt: skip
_ROTATIONS: Final = {"com.microsoft": 1, "": 3, "ai.onnx": 3}
"""At which input a RotaryEmbedding of a domain takes positions."""
_SAME_ROWS: Final = ("Cast", "Identity", "DequantizeLinear")
FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class GraphRoles:
    """Graph inputs and outputs by their role; None where the graph has no such thing."""

    input_ids: ir.Value  # [B, S]
    attention_mask: ir.Value  # [B, T], 1 = a real token
    position_ids: ir.Value | None  # [B, S]
    logits: ir.Value  # [B, S, vocabulary]
    caches: tuple[ir.Value, ...]  # past keys and values, [B, G, P, D]

    @property
    def dtype(self) -> ir.DataType:
        """The type the model computes in: its caches', or else its logits'."""
        source = self.caches[0] if self.caches else self.logits
        return source.dtype or ir.DataType.FLOAT


def find_roles(graph: ir.Graph) -> GraphRoles:
    """Reads the roles from names, ranks and types.

    Raises:
        RefusedError: a role that every LLM graph must have is missing; the message lists what is
            there.
    """
    ids = _input_like(graph, "input_ids", 2) or _embedded(graph)
    mask = _input_like(graph, "attention_mask", 2) or _only_mask(graph)
    return GraphRoles(
        input_ids=_required(graph, "input_ids", ids),
        attention_mask=_required(graph, "attention_mask", mask),
        position_ids=_input_like(graph, "position_ids", 2) or _positions(graph),
        logits=_logits(graph, ids),
        caches=tuple(value for value in graph.inputs if is_cache(value)),
    )


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input is a past key or value: floats of rank 4 that are no mask."""
    return value.dtype in FLOATS and rank(value) == 4 and not is_score_mask(value)


def is_score_mask(value: ir.Value) -> bool:
    """Whether a graph input hides, or weighs, keys for each row by itself: `[B, 1, S, T]`."""
    if rank(value) != 4 or value.shape is None:
        return False
    named = re.search(r"mask|bias", str(value.name).lower()) is not None
    uses = value.consumers()
    added = bool(uses) and all(is_op(node, "Add", "Where", "Less", "Greater") for node in uses)
    return named or (added and not isinstance(value.shape[3], int))


def rank(value: ir.Value) -> int | None:
    """Number of axes, if the file says."""
    return None if value.shape is None else len(value.shape)


def _input_like(graph: ir.Graph, part: str, axes: int) -> ir.Value | None:
    exact = [value for value in graph.inputs if value.name == part]
    close = [value for value in graph.inputs if part in (value.name or "")]
    fitting = [value for value in exact or close if rank(value) in (axes, None)]
    return fitting[0] if fitting else None


def _embedded(graph: ir.Graph) -> ir.Value | None:
    """The only input that chooses rows of a table with as many rows as the logits have numbers.

    Where no output says how many it has, the only one that chooses rows of a table at all, turns
    no rotation, and is not called after types or positions.
    """
    tables = {
        value: _table_rows(value)
        for value in graph.inputs
        if value.dtype in INTEGERS and rank(value) == _MATRIX
    }
    sizes = {value.shape[-1] for value in graph.outputs if value.shape and rank(value) == 3}
    found = [value for value, rows in tables.items() if rows & sizes]
    if not found:
        found = [value for value, rows in tables.items() if rows and not _is_other(value)]
    return found[0] if len(found) == 1 else None


def _is_other(value: ir.Value) -> bool:
    return _OTHER_IDS.search(str(value.name).lower()) is not None or turns(value)


def _table_rows(ids: ir.Value) -> set[int]:
    """Numbers of rows of the constant tables that it, or a cast of it, chooses from."""
    values = [ids]
    for node in ids.consumers():
        values += node.outputs if node.op_type == "Cast" else ()
    tables = [
        ir.convenience.get_const_tensor(_stored(needed_input(node, 0)))
        for value in values
        for node in value.consumers()
        if node.op_type in ("Gather", "GatherBlockQuantized") and node.inputs[1] is value
    ]
    return {int(x.shape[0]) for x in tables if x is not None and isinstance(x.shape[0], int)}


def _stored(table: ir.Value) -> ir.Value:
    """What a table is before it is made another type, row by row."""
    node = table.producer()
    while node is not None and is_op(node, *_SAME_ROWS):
        table = needed_input(node, 0)
        node = table.producer()
    return table


def turns(value: ir.Value) -> bool:
    """Whether an input's numbers become the angles of a rotation, or choose them from a table."""
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        for node in current.consumers():
            if is_op(node, "Sin", "Cos") or _rotates_by(node, current):
                return True
            chosen = is_op(node, "Gather") and node.inputs[0] is current  # a section of several
            if chosen or is_op(node, *_TOWARDS_ANGLES):
                pending += [x for x in node.outputs if x not in seen]
                seen.update(node.outputs)
    return False


def _rotates_by(node: ir.Node, positions: ir.Value) -> bool:
    if node.op_type == "RotaryEmbedding" and node.domain in _ROTATIONS:
        return optional_input(node, _ROTATIONS[node.domain]) is positions
    if not is_op(node, "Gather") or node.inputs[1] is not positions:
        return False
    table = ir.convenience.get_const_tensor(_stored(needed_input(node, 0)))
    if table is None or not table.dtype.is_floating_point() or len(table.shape) != _MATRIX:
        return False
    first = constant_array(table)[0]  # position 0 turns nothing
    return bool((first == 1).all() or (first == 0).all())


def _only_mask(graph: ir.Graph) -> ir.Value | None:
    found = [
        value for value in graph.inputs if "mask" in (value.name or "") and rank(value) == _MATRIX
    ]
    return found[0] if len(found) == 1 else None


def _positions(graph: ir.Graph) -> ir.Value | None:
    found = [x for x in graph.inputs if x.dtype in INTEGERS and rank(x) == _MATRIX]
    named = [value for value in found if value.name in POSITIONS]
    turning = [value for value in found if turns(value)]
    return next(iter(named or (turning if len(turning) == 1 else [])), None)


def _required(graph: ir.Graph, role: str, value: ir.Value | None) -> ir.Value:
    if value is None:
        names = ", ".join(f"{x.name} {x.shape}" for x in list(graph.inputs)[:6])
        raise RefusedError(
            f"the graph has no input {role} [batch, length], so it is not a text decoder that "
            f"trianglemix knows (its inputs: {names or 'none'}); export a causal language model "
            "with input_ids and attention_mask"
        )
    return value


def _logits(graph: ir.Graph, ids: ir.Value | None) -> ir.Value:
    """An output of that very name; else the one with a row of the vocabulary per token.

    Routers, and heads that look further ahead, have logits of their own; names tell them.
    """
    exact = [value for value in graph.outputs if value.name == "logits"]
    if exact:
        return exact[0]
    candidates = [
        value
        for value in graph.outputs
        if value.dtype in (*FLOATS, None) and rank(value) in (3, None)
    ]
    for keep in (_is_main, _of_vocabulary(ids), _is_named_logits):
        candidates = [value for value in candidates if keep(value)] or candidates
    if not candidates or not any(_is_main(value) for value in candidates):
        names = ", ".join(str(value.name) for value in list(graph.outputs)[:6])
        raise RefusedError(
            "the graph has no output logits [batch, length, vocabulary] "
            f"(its outputs: {names or 'none'}); export a causal language model"
        )
    if len(candidates) > 1:
        raise RefusedError(
            f"the outputs {' and '.join(str(value.name) for value in candidates)} may each be the "
            "logits; rename the right one to logits"
        )
    return candidates[0]


def _is_main(value: ir.Value) -> bool:
    return _OTHER_LOGITS.search((value.name or "").lower()) is None


def _is_named_logits(value: ir.Value) -> bool:
    return "logits" in (value.name or "").lower()


def _of_vocabulary(ids: ir.Value | None) -> Callable[[ir.Value], bool]:
    """Whether an output's last dimension is the number of rows of the token embeddings."""
    rows = set() if ids is None else _table_rows(ids)

    def fits(value: ir.Value) -> bool:
        return value.shape is not None and value.shape[-1] in rows

    return fits
