"""The operator as one model-local ONNX function in standard operators.

An ONNX Runtime without our library inlines it and gives the same numbers, slowly, with `S x T`
scores. One body serves ragged, growing and preallocated caches. An ONNX function cannot ask
whether an input is absent, so a node that relies on it has all nine inputs connected.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import FunctionBuilder
from trianglemix.custom_ops.triangle.contract import ATTRIBUTES, OP_TYPE

_INT32, _INT64, _FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
_MASKED_SCORE: Final = -3.0e38


def build_function() -> ir.Function:
    """A new `trianglemix::TriangleAttention` function at `contract.FUNCTION_OPSET`."""
    inputs = {name: ir.Value(name=name) for name in contract.INPUTS}
    graph = ir.Graph(
        list(inputs.values()),
        [],
        nodes=[],
        opset_imports={"": contract.FUNCTION_OPSET},
        name=OP_TYPE,
    )
    build = FunctionBuilder(graph, OP_TYPE)
    graph.outputs.extend(_body(build, inputs))
    for name, value in zip(contract.OUTPUTS, graph.outputs, strict=True):
        value.name = name
    graph.extend(build.nodes)
    kinds = {name: ir.AttributeType.INT for name in ATTRIBUTES}
    kinds[contract.ATTR_SCALE] = kinds[contract.ATTR_SOFTCAP] = ir.AttributeType.FLOAT
    attributes = [ir.Attr(name, kind, None) for name, kind in kinds.items()]
    return ir.Function(contract.DOMAIN, OP_TYPE, graph=graph, attributes=attributes)


def _body(b: FunctionBuilder, x: dict[str, ir.Value]) -> list[ir.Value]:
    """`[output, present_key, present_value]`. Shape letters as in `contract.INPUTS`."""
    length = b.dimension(x["query"], 1)  # S
    end = b.op("Add", b.cast(x["seqlens_k"], _INT64), b.ints(1))  # L, [B]
    start = b.op("Max", b.op("Sub", end, length), b.ints(0))  # [B]
    total = b.reshape(b.cast(x["total_sequence_length"], _INT64), 1)
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
    b: FunctionBuilder, new: ir.Value, past: ir.Value, fresh: ir.Value, slots: ir.Value
) -> ir.Value:
    """Writes the new tokens `[B, S, G*D]` into their slots of the cache: `[B, G, T, D]`."""
    batch, length = b.dimension(new, 0), b.dimension(new, 1)
    heads, size = b.dimension(past, 1), b.dimension(past, 3)
    tokens = b.reshape(new, batch, length, heads, size)
    tokens = b.transpose(tokens, 0, 2, 1, 3)  # [B, G, S, D]
    last = b.op("Sub", length, b.ints(1))
    index = b.op("Max", b.op("Min", fresh, last), b.ints(0))  # [B, T]
    index = b.expand(b.unsqueeze(index, 1, 3), batch, heads, slots, size)
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


def _kept(b: FunctionBuilder, x: dict[str, ir.Value], row: ir.Value, slot: ir.Value) -> ir.Value:
    """The predicate of `pattern.keep` on `[B, S, T]`."""
    integer = ir.AttributeType.INT
    i, j = b.unsqueeze(row, 2), b.unsqueeze(slot, 0, 1)
    first_valid = b.unsqueeze(b.cast(x["first_valid"], _INT64), 1, 2)
    prompt_length = b.unsqueeze(b.cast(x["prompt_length"], _INT64), 1, 2)
    window = b.attribute(contract.ATTR_WINDOW, integer)
    distance = b.op("Sub", i, j)
    sink = b.op("Less", b.op("Sub", j, first_valid), b.attribute(contract.ATTR_SINK, integer))
    near = b.op("Or", b.op("Less", distance, window), b.op("Less", window, b.int64(0)))
    last = b.op(
        "GreaterOrEqual",
        i,
        b.op("Sub", prompt_length, b.attribute(contract.ATTR_LAST, integer)),
    )
    kept = b.op("Or", b.op("Or", sink, near), last)
    return b.op("And", kept, b.op("GreaterOrEqual", distance, b.int64(0)))


def _attend(
    b: FunctionBuilder,
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
    rows = b.reshape(query, batch, length, kv_heads, group, size)
    rows = b.transpose(rows, 0, 2, 3, 1, 4)
    # A dead slot may hold NaN, and 0 * NaN is NaN: only existing slots take part.
    live = b.unsqueeze(exists, 1, 3)
    nothing = b.op("CastLike", b.scalar(0.0), query)
    key, value = (
        b.unsqueeze(b.cast(b.op("Where", live, slots, nothing), _FLOAT), 2) for slots in present
    )  # [B, G, 1, T, D]
    scale = b.attribute(contract.ATTR_SCALE, real)
    default = b.op("Reciprocal", b.op("Sqrt", b.cast(b.squeeze(size, 0), _FLOAT)))
    zero = b.scalar(0.0)
    scale = b.op("Where", b.op("Equal", scale, zero), default, scale)
    scores = b.op(
        "MatMul",
        b.op("Mul", b.cast(rows, _FLOAT), scale),
        b.transpose(key, 0, 1, 2, 4, 3),
    )  # [B, G, H/G, S, T]
    scores = _capped(b, scores)
    kept = b.unsqueeze(mask, 1, 2)
    weights = b.op("Softmax", b.op("Where", kept, scores, b.scalar(_MASKED_SCORE)), axis=-1)
    output = b.op("MatMul", b.op("Where", kept, weights, zero), value)
    output = b.reshape(b.transpose(output, 0, 3, 1, 2, 4), batch, length, -1)
    return b.op("CastLike", output, query)


def _capped(b: FunctionBuilder, scores: ir.Value) -> ir.Value:
    """`softcap * tanh(scores / softcap)`, or the scores where softcap is 0."""
    softcap = b.attribute(contract.ATTR_SOFTCAP, ir.AttributeType.FLOAT)
    has_cap = b.op("Greater", softcap, b.scalar(0.0))
    divisor = b.op("Where", has_cap, softcap, b.scalar(1.0))
    capped = b.op("Mul", divisor, b.op("Tanh", b.op("Div", scores, divisor)))
    return b.op("Where", has_cap, capped, scores)
