"""Example decoders whose attention differs from the plain one in one respect."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.patterns._example import (
    SHAPE,
    Attend,
    ExampleLayer,
    additive_mask,
    appended,
    build_example,
    decomposed_attention,
    merged,
    repeated,
)

Result = tuple[ir.Value, ir.Value, ir.Value]
WINDOW = 7


def windowed(window: int = WINDOW) -> Example:
    """Every layer slides a window of its own."""
    return build_example(lambda b, x: _attend(b, x, mask=_window_mask(b, x, window)), opset=18)


def every_second_windowed(window: int = WINDOW) -> Example:
    """Layers 0 and 2 slide a window, layer 1 is causal."""
    layers = iter(range(3))

    def attend(build: GraphBuilder, layer: ExampleLayer) -> Result:
        if next(layers) == 1:
            return decomposed_attention(build, layer)
        return _attend(build, layer, mask=_window_mask(build, layer, window))

    return build_example(attend, opset=18)


def bidirectional() -> Example:
    """No causal mask: every row sees every key."""
    none = np.zeros((1, 1, 1, 1), np.float32)
    return build_example(lambda b, x: _attend(b, x, mask=b.constant("none4", none)), opset=18)


def unpadded() -> Example:
    """A causal mask that reads the shape of `attention_mask` only."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> Result:
        total = build.op("Squeeze", build.dimension(layer.attention_mask, 1))
        past = build.op("Sub", total, build.op("Squeeze", build.dimension(layer.query, 1)))
        row = build.op("Range", past, total, build.int64(1))
        key = build.op("Range", build.int64(0), total, build.int64(1))
        later = build.op("Less", build.op("Unsqueeze", row, build.ints(1)), key)
        least = build.constant("least", np.array(np.finfo(np.float32).min))
        mask = build.op("Where", later, least, build.constant("none", np.array(0, np.float32)))
        return _attend(build, layer, mask=mask)

    return build_example(attend, opset=18)


def biased() -> Example:
    """A bias by head and key on the scores, as ALiBi has it."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> Result:
        slopes = np.linspace(0.1, 0.4, SHAPE.num_heads, dtype=np.float32).reshape(1, -1, 1, 1)
        total = build.op("Squeeze", build.dimension(layer.attention_mask, 1))
        key = build.op("Range", build.int64(0), total, build.int64(1))
        bias = build.op("Mul", build.cast(key, ir.DataType.FLOAT), build.constant("slopes", slopes))
        return _attend(build, layer, mask=build.op("Add", additive_mask(build, layer), bias))

    return build_example(attend, opset=18)


def softcapped(cap: float = 2.0) -> Example:
    """`cap * tanh(scores / cap)` before the mask."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> Result:
        return _attend(build, layer, mask=additive_mask(build, layer), cap=cap)

    return build_example(attend, opset=18)


def in_place_of(attend: Attend, opset: int = 18) -> Example:
    """The example decoder with another attention."""
    return build_example(attend, opset=opset)


def _attend(
    build: GraphBuilder, layer: ExampleLayer, *, mask: ir.Value, cap: float | None = None
) -> Result:
    """Decomposed attention with a given additive mask."""
    split = build.op("Reshape", layer.query, build.ints(0, 0, SHAPE.num_heads, SHAPE.head_size))
    query = build.op("Transpose", split, perm=[0, 2, 1, 3])
    present_key = appended(build, layer.past_key, layer.key)
    present_value = appended(build, layer.past_value, layer.value)
    keys = build.op("Transpose", repeated(build, present_key), perm=[0, 1, 3, 2])
    scale = build.constant("scale", np.array(SHAPE.head_size**-0.5, np.float32))
    scores = build.op("Mul", build.op("MatMul", query, keys), scale)
    if cap is not None:
        divisor = build.constant("cap", np.array(cap, np.float32))
        scores = build.op("Mul", build.op("Tanh", build.op("Div", scores, divisor)), divisor)
    weights = build.op("Softmax", build.op("Add", scores, mask), axis=-1)
    result = build.op("MatMul", weights, repeated(build, present_value))
    return merged(build, result), present_key, present_value


def _window_mask(build: GraphBuilder, layer: ExampleLayer, window: int) -> ir.Value:
    """The causal mask, and the least float where `i - j >= window`."""
    total = build.dimension(layer.attention_mask, 1)
    length = build.dimension(layer.query, 1)
    key = build.op("Range", build.int64(0), build.op("Squeeze", total), build.int64(1))
    first = build.op("Squeeze", build.op("Sub", total, length))
    row = build.op("Range", first, build.op("Squeeze", total), build.int64(1))
    distance = build.op("Sub", build.op("Unsqueeze", row, build.ints(1)), key)
    far = build.op("GreaterOrEqual", distance, build.int64(window))
    least = build.constant("least", np.array(np.finfo(np.float32).min))
    return build.op("Where", far, least, additive_mask(build, layer))


def peaked(factor: float = 100.0) -> Example:
    """The plain decoder with larger queries: some keys get most of a row's attention."""
    example = build_example(decomposed_attention, opset=18)
    for name, value in example.model.graph.initializers.items():
        if name.endswith(".q"):
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)
    return example
