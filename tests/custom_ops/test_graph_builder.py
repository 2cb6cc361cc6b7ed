"""Names and constants of what is built are shared where they may be, and never made twice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import FunctionBuilder, GraphBuilder


def _graph() -> ir.Graph:
    return ir.Graph([], [], nodes=[], opset_imports={"": 17})


def test_equal_constants_are_one_for_all_builders_of_a_graph() -> None:
    graph = _graph()
    first, second = GraphBuilder(graph, "a"), GraphBuilder(graph, "b")
    assert first.ints(1, 2) is second.ints(1, 2)
    assert first.int64(3) is not first.ints(3)
    long = np.arange(100)
    assert first.int32(long) is second.int32(long)
    assert first.int32(long) is not first.int32(long + 1)
    assert len(graph.initializers) == 5


def test_a_constant_that_another_tool_changed_is_not_taken() -> None:
    graph = _graph()
    half = GraphBuilder(graph, "a").scalar(0.5)
    half.const_value = ir.tensor(np.float16(0.5), name=half.name)
    again = GraphBuilder(graph, "b").scalar(0.5)
    assert again is not half
    assert again.name != half.name
    assert again.dtype == ir.DataType.FLOAT


def test_names_are_made_once_also_before_nodes_are_in_the_graph() -> None:
    graph = _graph()
    build = GraphBuilder(graph, "scope")
    beside = build.at("scope")
    values = [x.op("Neg", x.ints(1)) for x in (build, beside, build)]
    graph.extend([*build.nodes, *beside.nodes])
    values.append(GraphBuilder(graph, "scope").op("Neg", build.ints(1)))
    assert len({value.name for value in values}) == 4


def test_a_function_has_constants_as_nodes() -> None:
    graph = _graph()
    build = FunctionBuilder(graph, "scope")
    build.reshape(build.ints(1, 2), -1)
    assert not graph.initializers
    assert [node.op_type for node in build.nodes] == ["Constant", "Constant", "Reshape"]
