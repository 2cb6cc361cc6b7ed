"""The last length before a graph computes otherwise is read to the token."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.interface.length_switch import length_switches


def _graph(op_type: str, limit: int, of: str, *, swapped: bool = False) -> ir.Graph:
    """A Where that chooses by comparing a length, got from `of`, with a limit."""
    kind = ir.TensorType(ir.DataType.INT64)
    source = ir.Value(name="given", shape=ir.Shape(["batch", "tokens"]), type=kind)
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 21}, name="switch")
    build = GraphBuilder(graph, "switch")
    if of == "shape":
        length = build.op("Squeeze", build.dimension(source, 1))
    elif of == "sum":
        length = build.op("ReduceSum", source)
    else:
        length = build.op("ReduceMax", source)
        if of == "position and one":
            length = build.op("Add", build.int64(1), length)
    sides = [build.int64(limit), length] if swapped else [length, build.int64(limit)]
    chosen = build.op("Where", build.op(op_type, *sides), build.int64(5), build.int64(6))
    graph.extend(build.nodes)
    graph.outputs.append(chosen)
    return graph


@pytest.mark.parametrize("of", ["shape", "sum", "position and one", "position"])
@pytest.mark.parametrize(
    ("op_type", "swapped", "last"),
    [
        ("Greater", False, 20), ("GreaterOrEqual", False, 19), ("Less", False, 19),
        ("LessOrEqual", False, 20), ("Less", True, 20), ("LessOrEqual", True, 19),
        ("Greater", True, 19), ("GreaterOrEqual", True, 20),
    ],
)  # fmt: skip
def test_the_last_length_before(op_type: str, swapped: bool, last: int, of: str) -> None:
    more = 1 if of == "position" else 0  # the largest position of 21 tokens is 20
    assert length_switches(_graph(op_type, 20, of, swapped=swapped)) == (last + more,)
