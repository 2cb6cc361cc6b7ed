"""Products whose activations are rounded to 8 bits, without the rounding.

`--verify` compares such forms of source and export: a sum's last bit moves an activation by a step
of 1/255 of its tensor's range, and the range with it, until all rows differ by as much as a fault
would make (figures: docs/experiments.md, "Rounded activations").
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.builder import NodeBuilder
from trianglemix.exporter.graph.walk import is_op, optional_input

_FLOAT32_ACTIVATIONS: Final = 1  # of MatMulNBits
_ACCURACY: Final = "accuracy_level"


class UnroundActivationsPass(ir.passes.InPlacePass):
    """DynamicQuantizeLinear before MatMulInteger, and MatMulNBits with int8 activations.

    Weights stay as they are, so this is no other model to whoever wires its attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in list(model.graph):
            if node.op_type == "MatMulNBits" and node.attributes.get_int(_ACCURACY, 0) > 1:
                node.attributes.add(ir.AttrInt64(_ACCURACY, _FLOAT32_ACTIVATIONS))
                changed = True
            elif is_op(node, "DynamicQuantizeLinear") and _products(node):
                _unround(model.graph, node)
                changed = True
        return ir.passes.PassResult(model, changed)


def _products(node: ir.Node) -> list[ir.Node]:
    """Those that read the rounded numbers; none where something else does."""
    uses = list(node.outputs[0].uses())
    fits = all(is_op(use.node, "MatMulInteger") and use.idx == 0 for use in uses)
    return [use.node for use in uses] if fits else []


def _unround(graph: ir.Graph, node: ir.Node) -> None:
    """`x / scale` instead of `round(x / scale) + zero point`, from which the latter is taken."""
    build = NodeBuilder(graph, f"unround/{node.name}")
    steps = build.op("Div", optional_input(node, 0), node.outputs[1])
    graph.insert_after(node, build.nodes)
    for product in _products(node):
        build = NodeBuilder(graph, f"unround/{product.name}")
        weight, zero = optional_input(product, 1), optional_input(product, 3)
        assert weight is not None
        numbers = build.cast(weight, ir.DataType.FLOAT)
        if zero is not None:
            numbers = build.op("Sub", numbers, build.cast(zero, ir.DataType.FLOAT))
        result = build.op("MatMul", steps, numbers)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(product, build.nodes)
        product.outputs[0].replace_all_uses_with(result)
        graph.remove(product, safe=True)
