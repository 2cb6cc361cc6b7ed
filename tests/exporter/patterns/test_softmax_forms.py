"""Decomposed attention in every opset, and in spellings that the example does not have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.options import PatternRequest
from trianglemix.exporter.patterns._example import (
    SHAPE,
    ExampleLayer,
    additive_mask,
    appended,
    build_example,
    decomposed_attention,
    merged,
    repeated,
)

from tests.exporter import odd_models
from tests.exporter.example_oracle import example_logits
from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example

_CONTRIB = "com.microsoft"
KEEP_ALL = PatternRequest(4, 64, 8)


def _assert_equal_to_source(example: Example, tmp_path: Path) -> None:
    """The export that keeps everything equals the dense oracle and the source."""
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(0, 1, 2), pattern=KEEP_ALL)
    ids = random_ids(2, 30)
    session = Session.of(tmp_path / "out")
    assert_close(session.logits(ids), Session(path, session.manifest).logits(ids))
    assert_close(session.logits(ids), example_logits(example, ids, {}))


@pytest.mark.parametrize("opset", range(17, 25))
def test_every_opset(opset: int, tmp_path: Path) -> None:
    _assert_equal_to_source(build_example(decomposed_attention, opset=opset), tmp_path)
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert graph.opset_imports[""] == opset


def _split_scale(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
    """`q * sqrt(s)` times `K^T * sqrt(s)`, K transposed in one step from `[B, T, G, D]`."""
    root = build.constant("root", np.array(SHAPE.head_size**-0.25, np.float32))
    split = build.op("Reshape", layer.query, build.ints(0, 0, SHAPE.num_heads, SHAPE.head_size))
    query = build.op("Mul", root, build.op("Transpose", split, perm=[0, 2, 1, 3]))
    key, value = (
        appended(build, past, new)
        for past, new in ((layer.past_key, layer.key), (layer.past_value, layer.value))
    )
    rows = build.op("Transpose", repeated(build, key), perm=[0, 2, 1, 3])
    inverse = build.constant("inverse", np.array(SHAPE.head_size**0.25, np.float32))
    keys = build.op("Div", build.op("Transpose", rows, perm=[0, 2, 3, 1]), inverse)
    scores = build.op("MatMul", query, keys)
    weights = build.op("Softmax", build.op("Add", additive_mask(build, layer), scores), axis=-1)
    return merged(build, build.op("MatMul", weights, repeated(build, value))), key, value


def _where_mask_and_nan_guard(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
    """`Where(seen, scores, -inf)`, Softmax, `Where(IsNaN(p), 0, p)`."""
    output, key, value = decomposed_attention(build, layer)
    softmax = next(n for n in reversed(build.nodes) if n.op_type == "Softmax")
    add = softmax.inputs[0].producer()
    scores, mask = add.inputs
    at = build.nodes.index(softmax)
    after = build.nodes[at + 1 :]
    del build.nodes[at:]
    build.nodes.remove(add)
    seen = build.op("Equal", mask, build.constant("seen", np.array(0, np.float32)))
    infinity = build.constant("infinity", np.array(-np.inf, np.float32))
    softmax.replace_input_with(0, build.op("Where", seen, scores, infinity))
    build.nodes.append(softmax)
    weights = softmax.outputs[0]
    guarded = build.op("Where", build.op("IsNaN", weights),
                       build.constant("nought", np.array(0, np.float32)), weights)  # fmt: skip
    for node in after:
        for index, used in enumerate(node.inputs):
            if used is weights:
                node.replace_input_with(index, guarded)
    build.nodes.extend(after)
    return output, key, value


def _fused_products(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
    """As ONNX Runtime's optimizer saves it: keys turned and scores scaled inside the product."""
    split = build.op("Reshape", layer.query, build.ints(0, 0, SHAPE.num_heads, SHAPE.head_size))
    query = build.op("Transpose", split, perm=[0, 2, 1, 3])
    key, value = (
        appended(build, past, new)
        for past, new in ((layer.past_key, layer.key), (layer.past_value, layer.value))
    )
    scores = build.op(
        "FusedMatMul", query, repeated(build, key),
        domain=_CONTRIB, transB=1, alpha=SHAPE.head_size**-0.5,
    )  # fmt: skip
    scores.type = ir.TensorType(ir.DataType.FLOAT)
    scores.shape = ir.Shape(["batch", SHAPE.num_heads, None, None])
    weights = build.op("Softmax", build.op("Add", scores, additive_mask(build, layer)), axis=-1)
    summed = build.op("FusedMatMul", weights, repeated(build, value), domain=_CONTRIB)
    return merged(build, summed), key, value


@pytest.mark.parametrize("attend", [_split_scale, _where_mask_and_nan_guard, _fused_products])
def test_other_spellings(attend: object, tmp_path: Path) -> None:
    assert callable(attend)
    _assert_equal_to_source(build_example(attend, opset=18, domains=(_CONTRIB,)), tmp_path)


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    """Keys and values of the call itself only: the operator gets a past of no tokens."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        output, key, value = decomposed_attention(build, layer)
        for joined in (key, value):
            node = joined.producer()
            assert node is not None
            new = node.inputs[1]
            assert new is not None
            joined.replace_all_uses_with(new)
            build.nodes.remove(node)
        return output, build.op("Identity", key), build.op("Identity", value)

    example = build_example(attend, opset=18)
    graph = example.model.graph
    del graph.outputs[1:]
    for value in [value for value in graph.inputs if "past" in str(value.name)]:
        for node, index in list(value.uses()):
            node.replace_input_with(index, None)
        graph.inputs.remove(value)
    for node in list(graph):
        if node.op_type == "Identity":
            graph.remove(node, safe=True)
    path = save_example(example.model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(0, 1, 2), pattern=KEEP_ALL)
    assert not report.shared_cache
    session = Session.of(tmp_path / "out")
    assert session.manifest.cache == ()
    ids = random_ids(2, 30)
    assert_close(session.logits(ids), example_logits(example, ids, {}))
