"""Attention that the operator cannot say is refused with its reason and its node's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.patterns._example import (
    SHAPE,
    ExampleLayer,
    build_example,
    decomposed_attention,
    group_query_attention,
)

from tests.end_to_end.odd_interfaces import Interface, a_mask_for_each_row, rows_by_position
from tests.exporter import odd_models
from tests.exporter.exports import export_to, save_example


def _refusal(example: Example, tmp_path: Path) -> str:
    path = save_example(example.model, tmp_path / "source")
    with pytest.raises(RefusedError) as caught:
        export_to(path, tmp_path / "out", layers=(1,))
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_bidirectional_attention(tmp_path: Path) -> None:
    message = _refusal(odd_models.bidirectional(), tmp_path)
    assert "neither causal nor a sliding window" in message
    assert "Softmax" in message, "the node's name is missing"


def test_padding_that_is_not_hidden(tmp_path: Path) -> None:
    """A causal mask that leaves attention_mask's zeros aside."""
    assert "its mask shows padding" in _refusal(odd_models.unpadded(), tmp_path)


def test_a_mask_for_each_row_from_outside(tmp_path: Path) -> None:
    path = Interface({}, a_mask_for_each_row).write(tmp_path / "model.onnx")
    with pytest.raises(RefusedError, match=r"told from outside, .* by attention_mask_4d"):
        export_to(path, tmp_path / "out", layers=(1,))


def test_rows_counted_by_position(tmp_path: Path) -> None:
    """A padded row's positions lag behind its slots."""
    path = Interface({}, rows_by_position).write(tmp_path / "model.onnx")
    with pytest.raises(RefusedError, match=r"its mask shows padding: .* batch row 1"):
        export_to(path, tmp_path / "out", layers=(1,))


def test_values_scaled_inside(tmp_path: Path) -> None:
    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        two = build.constant("two", np.array(2, np.float32))
        output, key, value = decomposed_attention(build, layer)
        product = next(n for n in reversed(build.nodes) if n.op_type == "MatMul")
        scaled = build.op("Mul", product.inputs[1], two)
        product.replace_input_with(1, scaled)
        build.nodes.insert(build.nodes.index(product), build.nodes.pop())
        return output, key, value

    assert "values are scaled" in _refusal(build_example(attend, opset=18), tmp_path)


def test_something_else_reads_the_weights(tmp_path: Path) -> None:
    """Attention weights that go elsewhere as well cannot be made by the operator."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        output, key, value = decomposed_attention(build, layer)
        softmax = next(n for n in reversed(build.nodes) if n.op_type == "Softmax")
        seen = build.op("ReduceMax", softmax.outputs[0], keepdims=0)
        return build.op("Add", output, seen), key, value

    _refusal(build_example(attend, opset=18), tmp_path)


def test_something_else_reads_the_mask(tmp_path: Path) -> None:
    """A mask that stays alive would grow with the square of the prompt."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        output, key, value = decomposed_attention(build, layer)
        mask = next(n for n in reversed(build.nodes) if n.op_type == "Where").outputs[0]
        seen = build.op("ReduceMax", mask, keepdims=0)
        return build.op("Add", output, seen), key, value

    message = _refusal(build_example(attend, opset=18), tmp_path)
    assert "square of the prompt" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"smooth_softmax": 1}, "smooth_softmax=1"),
        ({"causal": 0}, "causal=0"),
        ({"qk_output": 1}, "qk_output=1"),
        ({"unheard_of": 3}, "unheard_of=3"),
    ],
)
def test_group_query_attention_with_more_to_it(
    change: dict[str, int], expected: str, tmp_path: Path
) -> None:
    example = build_example(group_query_attention, opset=21, domains=("com.microsoft",))
    for node in example.model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes.update({k: ir.AttrInt64(k, v) for k, v in change.items()})
    assert expected in _refusal(example, tmp_path)


def test_group_query_attention_inputs_are_refused_by_name(tmp_path: Path) -> None:
    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        result = group_query_attention(build, layer)
        node = next(n for n in reversed(build.nodes) if n.op_type == "GroupQueryAttention")
        sink = build.constant("sink", np.zeros(SHAPE.num_heads, np.float32))
        node.resize_inputs(12)
        node.replace_input_with(11, sink)
        return result

    message = _refusal(build_example(attend, opset=21, domains=("com.microsoft",)), tmp_path)
    assert "head_sink" in message


def test_old_opsets_are_refused(tmp_path: Path) -> None:
    model = build_example(decomposed_attention, opset=18).model
    model.graph.opset_imports[""] = 10
    path = save_example(model, tmp_path / "source")
    with pytest.raises(RefusedError, match="opset is 10"):
        export_to(path, tmp_path / "out")


def test_a_softmax_that_is_no_attention_is_left_alone(tmp_path: Path) -> None:
    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        output, key, value = decomposed_attention(build, layer)
        return build.op("Mul", output, build.op("Softmax", output, axis=-1)), key, value

    path = save_example(build_example(attend, opset=18).model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(1,))
    assert len(report.layers) == 3


def test_an_unused_looking_cache_is_refused(tmp_path: Path) -> None:
    """One layer whose attention is not found must not be left behind silently."""
    example = build_example(decomposed_attention, opset=18)
    graph = example.model.graph
    graph.inputs.append(
        ir.Value(name="past_key_values.9.key", type=ir.TensorType(ir.DataType.FLOAT),
                 shape=ir.Shape(["batch", 2, "past", 16]))
    )  # fmt: skip
    path = save_example(example.model, tmp_path / "source")
    with pytest.raises(ExportError, match=r"past_key_values\.9\.key"):
        export_to(path, tmp_path / "out")
