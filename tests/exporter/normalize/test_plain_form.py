"""What normalizing does to a graph: order, nodes that do nothing, sizes that are not stated."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.walk import dtype_of
from trianglemix.exporter.normalize.infer_shapes import InferShapesPass
from trianglemix.exporter.normalize.plain_form import RemoveIdlePass, SortNodesPass
from trianglemix.exporter.patterns._example import build_example, decomposed_attention

from tests.exporter.exports import Session, assert_close, export_to, random_ids


def _shuffled(path: Path, seed: int) -> Path:
    proto = ir.to_proto(build_example(decomposed_attention, opset=18).model)
    nodes = list(proto.graph.node)
    random.Random(seed).shuffle(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("seed", range(3))
def test_nodes_in_any_order(seed: int, tmp_path: Path) -> None:
    """ONNX Runtime opens such a file, so it is exported; layers keep their order."""
    path = _shuffled(tmp_path / "shuffled.onnx", seed)
    report = export_to(path, tmp_path / "out", layers=(1,))
    sorted_path = tmp_path / "sorted.onnx"
    ir.save(build_example(decomposed_attention, opset=18).model, sorted_path)
    export_to(sorted_path, tmp_path / "expected", layers=(1,))
    ids = random_ids(2, 30)
    expected = Session.of(tmp_path / "expected").logits(ids)
    assert_close(Session.of(tmp_path / "out").logits(ids), expected)
    assert len(report.layers) == 3


def test_nodes_of_a_branch_are_sorted_too() -> None:
    source = ir.Value(name="x")
    second = ir.node("Neg", [source])
    first = ir.node("Neg", [second.outputs[0]])
    branch = ir.Graph([], [first.outputs[0]], nodes=[first, second], name="branch")
    choice = ir.node("If", [source], attributes={"then_branch": branch})
    graph = ir.Graph([source], [choice.outputs[0]], nodes=[choice], name="outer")
    SortNodesPass()(ir.Model(graph, ir_version=8))
    assert [node.inputs[0] for node in branch] == [source, second.outputs[0]]


def test_a_cycle_is_refused() -> None:
    first = ir.node("Neg", [ir.Value(name="nothing")])
    second = ir.node("Neg", [first.outputs[0]])
    first.replace_input_with(0, second.outputs[0])
    graph = ir.Graph([], [first.outputs[0]], nodes=[first, second], name="loop")
    with pytest.raises(RefusedError, match="wait for each other"):
        SortNodesPass()(ir.Model(graph, ir_version=8))


def _idle(build: GraphBuilder, value: ir.Value) -> dict[str, ir.Value]:
    return {
        "identity": build.op("Identity", value),
        "cast": build.op("Cast", value, to=int(ir.DataType.FLOAT)),
        "dropout": build.op("Dropout", value),
        "half": build.op("Cast", value, to=int(ir.DataType.FLOAT16)),
    }


def test_what_does_nothing_goes_away() -> None:
    """Output names stay; what a graph input or two outputs read keeps a node of its own."""
    given = ir.Value(name="given", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    graph = ir.Graph([given], [], nodes=[], opset_imports={"": 18}, name="idle")
    build = GraphBuilder(graph, "test")
    doubled = build.op("Add", given, given)
    inside = _idle(build, doubled)
    result = build.op("Sum", *inside.values())
    outputs = [
        build.op("Identity", result),
        build.op("Identity", result),
        build.op("Identity", given),
    ]
    for number, value in enumerate(outputs):
        value.name = f"out_{number}"
    graph.extend(build.nodes)
    graph.outputs.extend(outputs)
    RemoveIdlePass()(ir.Model(graph, ir_version=8))
    assert [value.name for value in graph.outputs] == ["out_0", "out_1", "out_2"]
    assert [node.op_type for node in graph] == ["Add", "Cast", "Sum", "Identity", "Identity"]


def test_a_dropout_that_trains_stays() -> None:
    given = ir.Value(name="given", type=ir.TensorType(ir.DataType.FLOAT))
    mode = ir.Value(name="mode", type=ir.TensorType(ir.DataType.BOOL))
    dropout = ir.node("Dropout", [given, None, mode])
    last = ir.node("Neg", [dropout.outputs[0]])
    graph = ir.Graph([given, mode], [last.outputs[0]], nodes=[dropout, last], name="train")
    RemoveIdlePass()(ir.Model(graph, ir_version=8))
    assert [node.op_type for node in graph] == ["Dropout", "Neg"]


def test_sizes_are_inferred_as_numbers_only() -> None:
    """No symbol is spread to values that the file says nothing of, and what it says stays."""
    model = build_example(decomposed_attention, opset=18).model
    stated = {value.name: value.shape for value in (*model.graph.inputs, *model.graph.outputs)}
    InferShapesPass()(model)
    made = [value for node in model.graph for value in node.outputs]
    scores = next(node for node in model.graph if node.op_type == "Softmax").outputs[0]
    assert scores.shape is not None
    assert len(scores.shape) == 4
    assert scores.dtype == ir.DataType.FLOAT
    for value in made:
        if value.name in stated:
            assert value.shape == stated[value.name]
        elif value.shape is not None:
            assert all(
                getattr(size, "value", size) is None or isinstance(size, int)
                for size in value.shape
            )


def test_a_type_is_that_of_the_data_not_of_its_sizes() -> None:
    """A Reshape of something unknown is of an unknown type, not of its sizes' int64."""
    unknown = ir.Value(name="unknown")
    sizes = ir.Value(name="sizes", type=ir.TensorType(ir.DataType.INT64))
    known = ir.Value(name="known", type=ir.TensorType(ir.DataType.FLOAT16))
    moved = ir.node("Reshape", [unknown, sizes]).outputs[0]
    assert dtype_of(moved) is None
    assert dtype_of(ir.node("Mul", [moved, known]).outputs[0]) == ir.DataType.FLOAT16
