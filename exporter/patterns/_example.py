"""The tiny decoder around a pattern's example: embedding, layers of attention, logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Example

SHAPE: Final = AttentionShape(num_heads=4, kv_num_heads=2, head_size=16, value_head_size=16)
_HIDDEN: Final = 40
_VOCABULARY: Final = 61
_LAYERS: Final = 3
_CONTRIB: Final = "com.microsoft"


@dataclass(frozen=True)
class ExampleLayer:
    """What an attention may use: `[B, S, heads*D]` projections, the past, the graph's mask."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    attention_mask: ir.Value


Attend = Callable[[GraphBuilder, ExampleLayer], tuple[ir.Value, ir.Value, ir.Value]]
"""Returns the output `[B, S, H*D]`, present key and present value."""


def build_example(attend: Attend, opset: int, domains: tuple[str, ...] = ()) -> Example:
    """A model of random weights (fixed seed) with the given attention in each layer."""
    random = np.random.default_rng(7)
    mask = graph_input("attention_mask", ir.DataType.INT64, "batch", "total")
    ids = graph_input("input_ids", ir.DataType.INT64, "batch", "sequence")
    pasts = [
        graph_input(f"past_key_values.{layer}.{part}", ir.DataType.FLOAT,
               "batch", SHAPE.kv_num_heads, "past", SHAPE.head_size)
        for layer in range(_LAYERS)
        for part in ("key", "value")
    ]  # fmt: skip
    imports = {"": opset, **dict.fromkeys(domains, 1)}
    graph = ir.Graph([ids, mask, *pasts], [], nodes=[], opset_imports=imports, name="example")
    build = GraphBuilder(graph, "example")
    hidden = build.op("Gather", _weight(build, random, "embedding", _VOCABULARY, _HIDDEN), ids)
    presents: list[ir.Value] = []
    width, kv_width = SHAPE.num_heads * SHAPE.head_size, SHAPE.kv_num_heads * SHAPE.head_size
    for layer in range(_LAYERS):
        query, key, value = (
            build.op("MatMul", hidden, _weight(build, random, f"{layer}.{part}", _HIDDEN, width))
            for part, width in (("q", width), ("k", kv_width), ("v", kv_width))
        )
        past_key, past_value = pasts[2 * layer : 2 * layer + 2]
        example_layer = ExampleLayer(query, key, value, past_key, past_value, mask)
        result, *present = attend(build, example_layer)
        for value, part in zip(present, ("key", "value"), strict=True):
            _name(value, f"present.{layer}.{part}", pasts[0], "total")
        presents += present
        projection = _weight(build, random, f"{layer}.o", width, _HIDDEN)
        hidden = build.op("Add", hidden, build.op("MatMul", result, projection))
    logits = build.op("MatMul", hidden, _weight(build, random, "head", _HIDDEN, _VOCABULARY))
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "sequence", _VOCABULARY])
    graph.extend(build.nodes)
    graph.outputs.extend([logits, *presents])
    return Example(ir.Model(graph, ir_version=8), SHAPE, _LAYERS, _VOCABULARY)


def decomposed_attention(
    build: GraphBuilder, layer: ExampleLayer
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention in standard operators, keys and values repeated for their groups."""
    query = _heads(build, layer.query, SHAPE.num_heads)
    present_key = appended(build, layer.past_key, layer.key)
    present_value = appended(build, layer.past_value, layer.value)
    keys = build.transpose(repeated(build, present_key), 0, 1, 3, 2)
    scale = build.scalar(SHAPE.head_size**-0.5)
    scores = build.op("Mul", build.op("MatMul", query, keys), scale)
    masked = build.op("Add", scores, additive_mask(build, layer))
    weights = build.op("Softmax", masked, axis=-1)
    result = build.op("MatMul", weights, repeated(build, present_value))
    return merged(build, result), present_key, present_value


def group_query_attention(
    build: GraphBuilder, layer: ExampleLayer
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`com.microsoft::GroupQueryAttention` with packed projections and the rotation inside."""
    packed = build.concat(layer.query, layer.key, layer.value, axis=-1)
    count = build.op("ReduceSum", layer.attention_mask, build.ints(1), keepdims=0)
    seqlens = build.cast(build.op("Sub", count, build.ints(1)), ir.DataType.INT32)
    total = build.cast(build.dimension(layer.attention_mask, 1), ir.DataType.INT32)
    angle = np.arange(4096)[:, None] * 10.0 ** -np.arange(0, 4, 4 / (SHAPE.head_size / 2))
    node = build.node(
        "GroupQueryAttention",
        [packed, None, None, layer.past_key, layer.past_value, seqlens, total,
         build.constant("cos", np.cos(angle).astype(np.float32)),
         build.constant("sin", np.sin(angle).astype(np.float32))],
        domain=_CONTRIB,
        attributes={"num_heads": SHAPE.num_heads, "kv_num_heads": SHAPE.kv_num_heads,
                    "do_rotary": 1},
        num_outputs=3,
    )  # fmt: skip
    output, present_key, present_value = node.outputs
    return output, present_key, present_value


def graph_input(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    """An input of these axes."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _weight(build: GraphBuilder, random: np.random.Generator, name: str, *shape: int) -> ir.Value:
    array: NDArray[Any] = random.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[0]))
    return build.constant(f"weight.{name}", array)


def _name(value: ir.Value, name: str, like: ir.Value, length: str) -> None:
    assert like.shape is not None
    value.name, value.type = name, like.type
    value.shape = ir.Shape([like.shape[0], like.shape[1], length, like.shape[3]])


def _heads(build: GraphBuilder, rows: ir.Value, count: int) -> ir.Value:
    """`[B, heads, S, D]` of `[B, S, heads*D]`."""
    split = build.reshape(rows, 0, 0, count, SHAPE.head_size)
    return build.transpose(split, 0, 2, 1, 3)


def appended(build: GraphBuilder, past: ir.Value, rows: ir.Value) -> ir.Value:
    """`[B, G, T, D]`: the past with the new tokens `[B, S, G*D]` after it."""
    return build.concat(past, _heads(build, rows, SHAPE.kv_num_heads), axis=2)


def merged(build: GraphBuilder, heads: ir.Value) -> ir.Value:
    """`[B, T, heads*D]` of `[B, heads, T, D]`."""
    rows = build.transpose(heads, 0, 2, 1, 3)
    return build.reshape(rows, 0, 0, -1)


def repeated(build: GraphBuilder, heads: ir.Value) -> ir.Value:
    """Each key/value head once for every query head of its group."""
    group = SHAPE.num_heads // SHAPE.kv_num_heads
    single = build.unsqueeze(heads, 2)
    many = build.expand(single, 1, 1, group, 1, 1)
    return build.reshape(many, 0, SHAPE.num_heads, -1, SHAPE.head_size)


def additive_mask(build: GraphBuilder, layer: ExampleLayer) -> ir.Value:
    """`[B, 1, S, T]`: 0 where a row sees a key, else the least float."""
    total = build.dimension(layer.attention_mask, 1)
    length = build.dimension(layer.query, 1)
    key = build.range_to(total)
    first = build.squeeze(build.op("Sub", total, length), 0)
    row = build.op("Range", first, build.squeeze(total, 0), build.int64(1))
    causal = build.op("LessOrEqual", key, build.unsqueeze(row, 1))
    real = build.cast(layer.attention_mask, ir.DataType.BOOL)
    seen = build.op("And", causal, build.unsqueeze(real, 1, 2))
    least = float(np.finfo(np.float32).min)
    return build.op("Where", seen, build.scalar(0), build.scalar(least))
