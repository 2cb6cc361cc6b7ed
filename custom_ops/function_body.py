"""An operator as one model-local ONNX function in standard operators, with the mask that it brings.

An ONNX Runtime without our library inlines it and gives the same numbers, slowly, with `S x T`
scores. One body serves ragged, growing and preallocated caches. An ONNX function cannot ask
whether an input is absent, so a node that relies on it has all nine inputs connected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import FunctionBuilder

_INT64, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
_MASKED_SCORE: Final = -3.0e38
_SHARED: Final = {
    contract.ATTR_NUM_HEADS: ir.AttributeType.INT,
    contract.ATTR_KV_NUM_HEADS: ir.AttributeType.INT,
    contract.ATTR_SCALE: ir.AttributeType.FLOAT,
    contract.ATTR_SOFTCAP: ir.AttributeType.FLOAT,
}


@dataclass(frozen=True)
class Scores:
    """What a mask is made of: the inputs by name, and what the body knows of rows and keys.

    `row` `[B, S]` and `slot` `[T]` are positions in the buffer, `end` `[B]` the row's `L`;
    `exists` `[B, T]` says which slots hold a key of the row; `scores` `[B, G, H/G, S, T]` are
    scaled and capped.
    """

    inputs: Mapping[str, ir.Value]
    row: ir.Value
    slot: ir.Value
    end: ir.Value
    exists: ir.Value
    scores: ir.Value


Mask = Callable[[FunctionBuilder, Scores], tuple[ir.Value, ...]]
"""Gives which keys of those that exist a row keeps, `[B, 1, 1, S, T]` or as large as the scores;
behind it the operator's own outputs."""


def masked_attention(
    name: str,
    attributes: Mapping[str, ir.AttributeType],
    mask: Mask,
    outputs: Sequence[str] = contract.OUTPUTS,
) -> ir.Function:
    """A new function for the operator `name`, at `contract.FUNCTION_OPSET`.

    `attributes` are the operator's own, beside `contract.ATTRIBUTES`.
    """
    inputs = {name: ir.Value(name=name) for name in contract.INPUTS}
    opsets = {"": contract.FUNCTION_OPSET}
    graph = ir.Graph(list(inputs.values()), [], nodes=[], opset_imports=opsets, name=name)
    build = FunctionBuilder(graph, name)
    graph.outputs.extend(_body(build, inputs, mask))
    for output, value in zip(outputs, graph.outputs, strict=True):
        value.name = output
    graph.extend(build.nodes)
    declared = [ir.Attr(x, kind, None) for x, kind in (_SHARED | dict(attributes)).items()]
    return ir.Function(contract.DOMAIN, name, graph=graph, attributes=declared)


def _body(b: FunctionBuilder, x: Mapping[str, ir.Value], mask: Mask) -> list[ir.Value]:
    """`output, present_key, present_value`, the mask's own. Shape letters as in `contract`."""
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
    # A dead slot may hold NaN, and 0 * NaN is NaN: only existing slots take part.
    live, nothing = b.unsqueeze(exists, 1, 3), b.op("CastLike", b.scalar(0.0), x["query"])
    key, value = (
        b.unsqueeze(b.cast(b.op("Where", live, slots, nothing), _FLOAT), 2)
        for slots in (present_key, present_value)
    )  # [B, G, 1, T, D]
    scores = _scores(b, x["query"], key)
    kept, *own = mask(b, Scores(x, row, slot, end, exists, scores))
    real = b.unsqueeze(b.op("Less", row, b.unsqueeze(end, 1)), 1, 2, 4)
    kept = b.op("And", b.op("And", kept, b.unsqueeze(exists, 1, 2, 3)), real)
    output = b.op("MatMul", softmax(b, scores, kept), value)
    output = b.reshape(b.transpose(output, 0, 3, 1, 2, 4), b.dimension(x["query"], 0), length, -1)
    present = (b.op("Identity", cache) for cache in (present_key, present_value))
    return [b.op("CastLike", output, x["query"]), *present, *own]


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


def _scores(b: FunctionBuilder, query: ir.Value, key: ir.Value) -> ir.Value:
    """`[B, G, H/G, S, T]` in float32, scaled and capped, of keys `[B, G, 1, T, D]`."""
    integer, real = ir.AttributeType.INT, ir.AttributeType.FLOAT
    kv_heads = b.unsqueeze(b.attribute(contract.ATTR_KV_NUM_HEADS, integer), 0)
    group = b.op("Div", b.unsqueeze(b.attribute(contract.ATTR_NUM_HEADS, integer), 0), kv_heads)
    batch, length, size = b.dimension(query, 0), b.dimension(query, 1), b.dimension(key, 4)
    rows = b.reshape(query, batch, length, kv_heads, group, size)
    rows = b.transpose(rows, 0, 2, 3, 1, 4)
    scale = b.attribute(contract.ATTR_SCALE, real)
    default = b.op("Reciprocal", b.op("Sqrt", b.cast(b.squeeze(size, 0), _FLOAT)))
    scale = b.op("Where", b.op("Equal", scale, b.scalar(0.0)), default, scale)
    scaled = b.op("Mul", b.cast(rows, _FLOAT), scale)
    return _capped(b, b.op("MatMul", scaled, b.transpose(key, 0, 1, 2, 4, 3)))


def softmax(b: FunctionBuilder, scores: ir.Value, kept: ir.Value) -> ir.Value:
    """Over the last axis's kept entries; all zeros where there are none."""
    weights = b.op("Softmax", b.op("Where", kept, scores, b.scalar(_MASKED_SCORE)), axis=-1)
    return b.op("Where", kept, weights, b.scalar(0.0))


def _capped(b: FunctionBuilder, scores: ir.Value) -> ir.Value:
    """`softcap * tanh(scores / softcap)`, or the scores where softcap is 0."""
    softcap = b.attribute(contract.ATTR_SOFTCAP, ir.AttributeType.FLOAT)
    has_cap = b.op("Greater", softcap, b.scalar(0.0))
    divisor = b.op("Where", has_cap, softcap, b.scalar(1.0))
    capped = b.op("Mul", divisor, b.op("Tanh", b.op("Div", scores, divisor)))
    return b.op("Where", has_cap, capped, scores)
