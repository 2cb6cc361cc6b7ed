"""A refusal names the cause: what the source computes that the operator does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.patterns._example import (
    SHAPE,
    ExampleLayer,
    build_example,
    decomposed_attention,
)

from tests.exporter import odd_models
from tests.exporter.exports import export_to, save_example

_FLOAT = ir.DataType.FLOAT


def _changed(change: Callable[[GraphBuilder, ir.Node, ir.Value], ir.Value]) -> ir.Model:
    """The example decoder whose softmax weights are made by `change(build, softmax, scores)`."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        result = decomposed_attention(build, layer)
        softmax = next(n for n in reversed(build.nodes) if n.op_type == "Softmax")
        at = build.nodes.index(softmax)
        after = build.nodes[at + 1 :]
        del build.nodes[at:]
        scores, weights = softmax.inputs[0], softmax.outputs[0]
        assert scores is not None
        made = change(build, softmax, scores)
        for node in after:
            for index, used in enumerate(node.inputs):
                if used is weights:
                    node.replace_input_with(index, made)
        build.nodes += after
        return result

    return build_example(attend, opset=18).model


def _softmax(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    softmax.replace_input_with(0, scores)
    build.nodes.append(softmax)
    return softmax.outputs[0]


def _sinks(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    """As gpt-oss has it: a number of each head joins its scores, and is cut off afterwards."""
    sinks = build.constant("sinks", np.full((1, SHAPE.num_heads, 1, 1), 0.5, np.float32))
    sizes = build.op("Concat", build.op("Shape", scores, end=3), build.ints(1), axis=0)
    joined = build.op("Concat", scores, build.op("Expand", sinks, sizes), axis=-1)
    largest = build.op("ReduceMax", joined, build.ints(-1), keepdims=1)
    weights = _softmax(build, softmax, build.op("Sub", joined, largest))
    return build.op("Slice", weights, build.ints(0), build.ints(-1), build.ints(3))


def _plus_one(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    power = build.op("Exp", scores)
    total = build.op("ReduceSum", power, build.ints(-1), keepdims=1)
    one = build.constant("one", np.array(1, np.float32))
    return build.op("Div", power, build.op("Add", total, one))


def _sigmoid(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    return build.op("Sigmoid", scores)


def _position_bias(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    """As T5 has it: a table by distance, of each head."""
    table = np.random.default_rng(0).standard_normal((8, SHAPE.num_heads)).astype(np.float32)
    total, length = (build.op("Squeeze", build.dimension(scores, axis)) for axis in (3, 2))
    keys = build.op("Range", build.int64(0), total, build.int64(1))
    first = build.op("Sub", total, length)
    rows = build.op("Range", first, total, build.int64(1))
    away = build.op("Sub", build.op("Unsqueeze", rows, build.ints(1)), keys)
    near = build.op("Clip", away, build.int64(0), build.int64(7))
    bias = build.op("Gather", build.constant("table", table), near)
    moved = build.op("Transpose", bias, perm=[2, 0, 1])
    biased = build.op("Add", scores, build.op("Unsqueeze", moved, build.ints(0)))
    return _softmax(build, softmax, biased)


def _scaled_weights(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    weights = _softmax(build, softmax, scores)
    return build.op("Mul", weights, build.constant("most", np.array(0.9, np.float32)))


def _summed_elsewhere(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    """Exponentials divided by their sum over the rows."""
    power = build.op("Exp", scores)
    return build.op("Div", power, build.op("ReduceSum", power, build.ints(2), keepdims=1))


def _other_axis(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    softmax.attributes["axis"] = ir.AttrInt64("axis", 2)
    return _softmax(build, softmax, scores)


def _quantised(build: GraphBuilder, softmax: ir.Node, scores: ir.Value) -> ir.Value:
    """QDQ around the softmax, as a static quantizer writes it."""
    scale = build.constant("step", np.array(0.1, np.float32))
    zero = build.constant("middle", np.array(0, np.int8))
    rounded = build.op("QuantizeLinear", scores, scale, zero)
    return _softmax(build, softmax, build.op("DequantizeLinear", rounded, scale, zero))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_sinks, "attention sinks"),
        (_plus_one, "softmax-plus-one"),
        (_sigmoid, "weights from Sigmoid"),
        (_position_bias, "by position and by head"),
        (_scaled_weights, "sum to 0.9"),
        (_summed_elsewhere, "no attention that trianglemix knows"),
        (_other_axis, "runs over axis 2 of 4"),
        (_quantised, "scores are quantised"),
    ],
)
def test_other_weights(
    change: Callable[[GraphBuilder, ir.Node, ir.Value], ir.Value], reason: str, tmp_path: Path
) -> None:
    path = save_example(_changed(change), tmp_path / "source")
    with pytest.raises(RefusedError, match=reason):
        export_to(path, tmp_path / "out", layers=(1,))


def test_alibi(tmp_path: Path) -> None:
    path = save_example(odd_models.biased().model, tmp_path / "source")
    with pytest.raises(RefusedError, match="added to its scores by position and by head"):
        export_to(path, tmp_path / "out", layers=(1,))


def test_quantised_products(tmp_path: Path) -> None:
    """onnxruntime's dynamic quantizer, told to quantise products of activations too."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = build_example(decomposed_attention, opset=18).model
    path = save_example(model, tmp_path / "float")
    quantize_dynamic(path, tmp_path / "model.onnx", weight_type=QuantType.QInt8,
                     extra_options={"MatMulConstBOnly": False})  # fmt: skip
    with pytest.raises(RefusedError, match="multiplies quantised activations"):
        export_to(tmp_path / "model.onnx", tmp_path / "out", layers=(1,))


def test_attention_over_an_encoder(tmp_path: Path) -> None:
    """Keys and values of a cache that nothing is appended to."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        result = decomposed_attention(build, layer)
        for present, past in zip(result[1:], (layer.past_key, layer.past_value), strict=True):
            for node in build.nodes:
                for index, used in enumerate(node.inputs):
                    if used is present:
                        node.replace_input_with(index, past)
        return result[0], *(build.op("Identity", x) for x in (layer.past_key, layer.past_value))

    path = save_example(build_example(attend, opset=18).model, tmp_path / "source")
    with pytest.raises(RefusedError, match="to which nothing is appended"):
        export_to(path, tmp_path / "out", layers=(1,))


def test_a_cache_without_an_axis_of_heads(tmp_path: Path) -> None:
    """`[B*H, T, D]`, as old exporters of BLOOM have it, by the name of the input."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        result = decomposed_attention(build, layer)
        for joined, past in zip(result[1:], (layer.past_key, layer.past_value), strict=True):
            append = joined.producer()
            assert append is not None
            at = build.nodes.index(append)
            after = build.nodes[at + 1 :]
            del build.nodes[at:]
            new = append.inputs[1]
            assert new is not None
            rows = build.op("Reshape", new, _sizes(build, [build.dimension(new, 2)]))
            flat = build.op("Concat", past, rows, axis=1)
            heads = [build.ints(SHAPE.kv_num_heads), build.dimension(flat, 1)]
            apart = build.op("Reshape", flat, _sizes(build, heads))
            for node in after:
                for index, used in enumerate(node.inputs):
                    if used is joined:
                        node.replace_input_with(index, apart)
            build.nodes += after
        pasts = (layer.past_key, layer.past_value)
        return result[0], *(build.op("Identity", past) for past in pasts)

    model = build_example(attend, opset=18).model
    for value in (*model.graph.inputs[2:], *model.graph.outputs[1:]):
        value.shape = ir.Shape(["rows", "past", SHAPE.head_size])
    path = save_example(model, tmp_path / "source")
    with pytest.raises(RefusedError, match=r"past_key_values.0.key has 3 axes"):
        export_to(path, tmp_path / "out", layers=(1,))


def _sizes(build: GraphBuilder, middle: list[ir.Value]) -> ir.Value:
    return build.op("Concat", build.ints(-1), *middle, build.ints(SHAPE.head_size), axis=0)


def _after_append(
    change: Callable[[GraphBuilder, ir.Value], ir.Value],
) -> ir.Model:
    """The example decoder, keys and values of which are `change(build, joined)` where repeated."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        result = decomposed_attention(build, layer)
        for joined in result[1:]:
            made = joined.producer()
            assert made is not None
            at = build.nodes.index(made) + 1
            after = build.nodes[at:]
            del build.nodes[at:]
            changed = change(build, joined)
            for node in after:
                for index, used in enumerate(node.inputs):
                    if used is joined:
                        node.replace_input_with(index, changed)
            build.nodes += after
        return result

    return build_example(attend, opset=18).model


def test_heads_repeated_in_turn(tmp_path: Path) -> None:
    """Key heads 0 1 0 1: each query head has one, but not the one that the operator gives it."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        result = decomposed_attention(build, layer)
        times = SHAPE.num_heads // SHAPE.kv_num_heads
        for node in build.nodes:
            apart = None if node.op_type != "Expand" else node.inputs[0]
            unsqueeze = None if apart is None else apart.producer()
            if unsqueeze is not None:  # [B, 1, G, T, D] expands to [B, H/G, G, T, D]
                unsqueeze.replace_input_with(1, build.ints(1))
                node.replace_input_with(1, build.ints(1, times, 1, 1, 1))
        return result

    path = save_example(build_example(attend, opset=18).model, tmp_path / "source")
    with pytest.raises(RefusedError, match="query head 1 reads key head 1, not 0"):
        export_to(path, tmp_path / "out", layers=(1,))


def test_a_part_of_a_larger_cache(tmp_path: Path) -> None:
    """Keys cut out of what is appended: as where keys and values are one tensor."""

    def half(build: GraphBuilder, joined: ir.Value) -> ir.Value:
        part = build.op("Slice", joined, build.ints(0), build.ints(8), build.ints(3))
        return build.op("Concat", part, build.op("Neg", part), axis=3)

    def whole(build: GraphBuilder, joined: ir.Value) -> ir.Value:
        return build.op("Slice", joined, build.ints(0), build.ints(99), build.ints(3))

    for name, change in (("whole", whole), ("half", half)):
        path = save_example(_after_append(change), tmp_path / name)
        with pytest.raises(RefusedError) as caught:
            export_to(path, tmp_path / "out", layers=(1,))
        assert name == "half" or "part of the cache past_key_values.0.key" in str(caught.value)
