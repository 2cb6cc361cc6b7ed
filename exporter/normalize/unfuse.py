"""Takes ONNX Runtime's fused products of activations apart, so that attention is found in them."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.graph.builder import NodeBuilder
from trianglemix.exporter.graph.roles import rank

_DOMAIN: Final = "com.microsoft"
_SWAPPED: Final = {2: [1, 0], 3: [0, 2, 1], 4: [0, 1, 3, 2]}


class UnfuseMatMulPass(ir.passes.InPlacePass):
    """`com.microsoft::FusedMatMul` becomes Transpose, MatMul and Mul.

    Only where neither side is a constant: products with weights are no attention and stay. So do
    those that move the batch axis, and those of an unknown number of axes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fused = [node for node in model.graph if _can_be_taken_apart(node)]
        for node in fused:
            _take_apart(model.graph, node)
        return ir.passes.PassResult(model, bool(fused))


def _can_be_taken_apart(node: ir.Node) -> bool:
    if (node.domain, node.op_type) != (_DOMAIN, "FusedMatMul") or node.outputs[0].is_graph_output():
        return False
    if any(node.attributes.get_int(f"transBatch{side}", 0) for side in "AB"):
        return False
    for value, side in zip(node.inputs[:2], "AB", strict=True):
        if value is None or ir.convenience.get_const_tensor(value) is not None:
            return False
        if node.attributes.get_int(f"trans{side}", 0) and _axes(value, node) is None:
            return False
    return True


def _axes(value: ir.Value, node: ir.Node) -> list[int] | None:
    """The order that swaps the last two axes of an operand."""
    return _SWAPPED.get(rank(value) or rank(node.outputs[0]) or 0)


def _take_apart(graph: ir.Graph, node: ir.Node) -> None:
    build = NodeBuilder(graph, f"source/{node.name or node.outputs[0].name}")
    operands = []
    for value, side in zip(node.inputs[:2], "AB", strict=True):
        assert value is not None
        swapped = node.attributes.get_int(f"trans{side}", 0)
        axes = _axes(value, node) if swapped else None
        operands.append(value if axes is None else build.op("Transpose", value, perm=axes))
    old, alpha = node.outputs[0], node.attributes.get_float("alpha", 1.0)
    product = build.op("MatMul", *operands)
    if alpha != 1.0:
        dtype = old.dtype or operands[0].dtype or ir.DataType.FLOAT
        factor = build.constant(f"alpha_{alpha:g}_{dtype.name}", np.array(alpha, dtype.numpy()))
        product = build.op("Mul", product, factor)
    product.type, product.shape = old.type, old.shape
    graph.insert_before(node, build.nodes)
    old.replace_all_uses_with(product)
    graph.remove(node, safe=True)
