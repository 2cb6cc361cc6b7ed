"""The operator as one model-local ONNX function in standard operators.

An ONNX Runtime without our library inlines it and gives the same numbers, slowly, with `S x T`
scores. One body serves ragged, growing and preallocated caches. An ONNX function cannot ask
whether an input is absent, so a node that relies on it has all nine inputs connected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import ATTRIBUTES, OP_TYPE

_INT32, _INT64, _FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
_MASKED_SCORE: Final = -3.0e38


class _Builder:
    """Appends nodes to a list; every method returns the value it made."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, *inputs: ir.Value, **attributes: int | float | Sequence[int]
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or None)
        return self._add(node)

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.op("Constant", value_ints=list(values))

    def int_scalar(self, value: int) -> ir.Value:
        return self.op("Constant", value_int=value)

    def float_scalar(self, value: float) -> ir.Value:
        return self.op("Constant", value_float=value)

    def attribute(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """The node's attribute `name` as a scalar constant."""
        field = "value_int" if kind == ir.AttributeType.INT else "value_float"
        reference = ir.RefAttr(field, name, kind)
        return self._add(ir.Node("", "Constant", [], [reference]))

    def dimension(self, value: ir.Value, axis: int) -> ir.Value:
        """Size of one axis, as a 1-D int64 of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def scalar(self, value: ir.Value) -> ir.Value:
        return self.op("Squeeze", value, self.ints(0))

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", value, self.ints(*axes))

    def concat(self, *values: ir.Value, axis: int = 0) -> ir.Value:
        return self.op("Concat", *values, axis=axis)

    def range_to(self, count: ir.Value) -> ir.Value:
        """`0 .. count-1` (int64) for a 1-D `count` of one element."""
        return self.op("Range", self.int_scalar(0), self.scalar(count), self.int_scalar(1))

    def _add(self, node: ir.Node) -> ir.Value:
        self.nodes.append(node)
        return node.outputs[0]


def build_function() -> ir.Function:
    """A new `trianglemix::TriangleAttention` function at `contract.FUNCTION_OPSET`."""
    inputs = {name: ir.Value(name=name) for name in contract.INPUTS}
    build = _Builder()
    outputs = _body(build, inputs)
    for name, value in zip(contract.OUTPUTS, outputs, strict=True):
        value.name = name
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=build.nodes,
        opset_imports={"": contract.FUNCTION_OPSET},
        name=OP_TYPE,
    )
    kinds = {name: ir.AttributeType.INT for name in ATTRIBUTES}
    kinds[contract.ATTR_SCALE] = kinds[contract.ATTR_SOFTCAP] = ir.AttributeType.FLOAT
    attributes = [ir.Attr(name, kind, None) for name, kind in kinds.items()]
    return ir.Function(contract.DOMAIN, OP_TYPE, graph=graph, attributes=attributes)


def _body(b: _Builder, x: dict[str, ir.Value]) -> list[ir.Value]:
    """`[output, present_key, present_value]`. Shape letters as in `contract.INPUTS`."""
    length = b.dimension(x["query"], 1)  # S
    end = b.op("Add", b.cast(x["seqlens_k"], _INT64), b.ints(1))  # L, [B]
    start = b.op("Max", b.op("Sub", end, length), b.ints(0))  # [B]
    total = b.op("Reshape", b.cast(x["total_sequence_length"], _INT64), b.ints(1))
    slots = b.op("Max", b.dimension(x["past_key"], 2), total)  # T
    slot = b.range_to(slots)  # [T]
    exists = b.op(
        "And",
        b.op("Less", b.unsqueeze(slot, 0), b.unsqueeze(end, 1)),
        b.op(
            "GreaterOrEqual", b.unsqueeze(slot, 0), b.unsqueeze(b.cast(x["first_valid"], _INT64), 1)
        ),
    )  # [B, T]
    fresh = b.op("Sub", b.unsqueeze(slot, 0), b.unsqueeze(start, 1))  # new-token index of a slot
    present_key = _append(b, x["key"], x["past_key"], fresh, slots)
    present_value = _append(b, x["value"], x["past_value"], fresh, slots)
    row = b.op("Add", b.unsqueeze(start, 1), b.unsqueeze(b.range_to(length), 0))  # [B, S]
    mask = b.op("And", _kept(b, x, row, slot), b.unsqueeze(exists, 1))
    mask = b.op("And", mask, b.unsqueeze(b.op("Less", row, b.unsqueeze(end, 1)), 2))  # [B, S, T]
    output = _attend(b, x["query"], (present_key, present_value), exists, mask)
    return [output, b.op("Identity", present_key), b.op("Identity", present_value)]


def _append(
    b: _Builder, new: ir.Value, past: ir.Value, fresh: ir.Value, slots: ir.Value
) -> ir.Value:
    """Writes the new tokens `[B, S, G*D]` into their slots of the cache: `[B, G, T, D]`."""
    batch, length = b.dimension(new, 0), b.dimension(new, 1)
    heads, size = b.dimension(past, 1), b.dimension(past, 3)
    tokens = b.op("Reshape", new, b.concat(batch, length, heads, size))
    tokens = b.op("Transpose", tokens, perm=[0, 2, 1, 3])  # [B, G, S, D]
    last = b.op("Sub", length, b.ints(1))
    index = b.op("Max", b.op("Min", fresh, last), b.ints(0))  # [B, T]
    index = b.op("Expand", b.unsqueeze(index, 1, 3), b.concat(batch, heads, slots, size))
    gathered = b.op("GatherElements", tokens, index, axis=2)
    missing = b.op("Sub", slots, b.dimension(past, 2))
    room = b.op("ConstantOfShape", b.concat(batch, heads, missing, size))
    kept = b.concat(past, b.op("CastLike", room, past), axis=2)
    is_new = b.op(
        "And",
        b.op("GreaterOrEqual", fresh, b.ints(0)),
        b.op("Less", fresh, length),
    )
    return b.op("Where", b.unsqueeze(is_new, 1, 3), gathered, kept)


def _kept(b: _Builder, x: dict[str, ir.Value], row: ir.Value, slot: ir.Value) -> ir.Value:
    """The predicate of `pattern.keep` on `[B, S, T]`."""
    integer = ir.AttributeType.INT
    i, j = b.unsqueeze(row, 2), b.unsqueeze(slot, 0, 1)
    first_valid = b.unsqueeze(b.cast(x["first_valid"], _INT64), 1, 2)
    prompt_length = b.unsqueeze(b.cast(x["prompt_length"], _INT64), 1, 2)
    window = b.attribute(contract.ATTR_WINDOW, integer)
    distance = b.op("Sub", i, j)
    sink = b.op("Less", b.op("Sub", j, first_valid), b.attribute(contract.ATTR_SINK, integer))
    near = b.op("Or", b.op("Less", distance, window), b.op("Less", window, b.int_scalar(0)))
    last = b.op(
        "GreaterOrEqual",
        i,
        b.op("Sub", prompt_length, b.attribute(contract.ATTR_LAST, integer)),
    )
    kept = b.op("Or", b.op("Or", sink, near), last)
    return b.op("And", kept, b.op("GreaterOrEqual", distance, b.int_scalar(0)))


def _attend(
    b: _Builder,
    query: ir.Value,
    present: tuple[ir.Value, ir.Value],
    exists: ir.Value,
    mask: ir.Value,
) -> ir.Value:
    """`[B, S, H*Dv]` in the query's type; scores and sums in float32, heads grouped by key head."""
    integer, real = ir.AttributeType.INT, ir.AttributeType.FLOAT
    kv_heads = b.unsqueeze(b.attribute(contract.ATTR_KV_NUM_HEADS, integer), 0)
    group = b.op("Div", b.unsqueeze(b.attribute(contract.ATTR_NUM_HEADS, integer), 0), kv_heads)
    batch, length, size = b.dimension(query, 0), b.dimension(query, 1), b.dimension(present[0], 3)
    shape = b.concat(batch, length, kv_heads, group, size)
    rows = b.op("Transpose", b.op("Reshape", query, shape), perm=[0, 2, 3, 1, 4])
    # A dead slot may hold NaN, and 0 * NaN is NaN: only existing slots take part.
    live = b.unsqueeze(exists, 1, 3)
    nothing = b.op("CastLike", b.float_scalar(0.0), query)
    key, value = (
        b.unsqueeze(b.cast(b.op("Where", live, slots, nothing), _FLOAT), 2) for slots in present
    )  # [B, G, 1, T, D]
    scale = b.attribute(contract.ATTR_SCALE, real)
    default = b.op("Reciprocal", b.op("Sqrt", b.cast(b.scalar(size), _FLOAT)))
    zero = b.float_scalar(0.0)
    scale = b.op("Where", b.op("Equal", scale, zero), default, scale)
    scores = b.op(
        "MatMul",
        b.op("Mul", b.cast(rows, _FLOAT), scale),
        b.op("Transpose", key, perm=[0, 1, 2, 4, 3]),
    )  # [B, G, H/G, S, T]
    scores = _capped(b, scores)
    kept = b.unsqueeze(mask, 1, 2)
    weights = b.op("Softmax", b.op("Where", kept, scores, b.float_scalar(_MASKED_SCORE)), axis=-1)
    output = b.op("MatMul", b.op("Where", kept, weights, zero), value)
    output = b.op("Transpose", output, perm=[0, 3, 1, 2, 4])
    output = b.op("Reshape", output, b.concat(batch, length, b.ints(-1)))
    return b.op("CastLike", output, query)


def _capped(b: _Builder, scores: ir.Value) -> ir.Value:
    """`softcap * tanh(scores / softcap)`, or the scores where softcap is 0."""
    softcap = b.attribute(contract.ATTR_SOFTCAP, ir.AttributeType.FLOAT)
    has_cap = b.op("Greater", softcap, b.float_scalar(0.0))
    divisor = b.op("Where", has_cap, softcap, b.float_scalar(1.0))
    capped = b.op("Mul", divisor, b.op("Tanh", b.op("Div", scores, divisor)))
    return b.op("Where", has_cap, capped, scores)
