"""How much of each head turns is read off the tables, or said so that wrong tables are refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.graph.rotation import Rotation, rotate

_HEAD_SIZE = 32


def _stored(width: int) -> ir.Value:
    tensor = ir.tensor(np.ones((4, width), np.float32), name="table")
    return ir.Value(name="table", const_value=tensor, shape=ir.Shape(tensor.shape))


def _chosen(*widths: int) -> ir.Value:
    """What an If chooses of two constants: its dimensions have names only, as in genai's graphs."""
    branches = []
    for name, width in zip(("then_branch", "else_branch"), widths, strict=True):
        tensor = ir.tensor(np.ones((4, width), np.float32))
        constant = ir.node("Constant", [], attributes={"value": tensor})
        graph = ir.Graph([], list(constant.outputs), nodes=[constant], name=name)
        branches.append(ir.Attr(name, ir.AttributeType.GRAPH, graph))
    condition = ir.Value(name="is_long")
    chosen = ir.Node("", "If", [condition], branches).outputs[0]
    chosen.shape = ir.Shape(["positions", "half"])
    return chosen


@pytest.mark.parametrize(
    ("table", "dimension"),
    [
        (_stored(16), 0),
        (_stored(8), 16),
        (_chosen(16, 16), 0),
        (_chosen(8, 8), 16),
        (_chosen(8, 16), _HEAD_SIZE),
        (ir.Value(name="unknown"), _HEAD_SIZE),
    ],
)
def test_the_turned_part_is_as_wide_as_the_tables(table: ir.Value, dimension: int) -> None:
    """0: the attribute is left out. Unknown tables are said to turn all: others do not run then."""
    rows, positions = ir.Value(name="rows"), ir.Value(name="positions")
    build = GraphBuilder(ir.Graph([rows, positions], [], nodes=[], opset_imports={"": 21}), "test")
    rotate(build, rows, (6, _HEAD_SIZE), Rotation(table, table, False), positions)
    assert build.nodes[0].attributes.get_int("rotary_embedding_dim", 0) == dimension
