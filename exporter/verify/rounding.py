"""What a model rounds its numbers to, and its activations without it.

`--verify` compares forms of source and export that do not round activations to 8 bits: a sum's last
bit moves an activation by a step of 1/255 of its tensor's range, and the range with it, until all
rows differ by as much as a fault would make (figures: docs/experiments.md, "Rounded activations").
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.graph.walk import is_op, optional_input

_ROUNDED_TO_INT8 = frozenset(
    {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
     "QAttention", "QuantizeLinear", "QLinearMatMul"}
)  # fmt: skip
_INT8_ACTIVATIONS = 4  # of MatMulNBits
_FLOAT32_ACTIVATIONS: Final = 1  # of MatMulNBits
_ACCURACY: Final = "accuracy_level"
_NAMES = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT16: "float16"}


def coarsest_type(path: Path, cache_dtype: str) -> str:
    """ "bfloat16", "int8", "float16" or "float32", of weights, casts, caches and activations.

    A float16 graph may have float32 caches and logits (`keep_io_types`); its numbers are no
    better for it.
    """
    return _coarsest(ir.load(path).graph, cache_dtype)


def unrounded_type(path: Path, cache_dtype: str) -> str | None:
    """The same of a model whose activations are rounded, without that; None of all others.

    "unrounded" stands for float32.
    """
    model = ir.load(path)
    changed = UnroundActivationsPass()(model).modified
    dtype = _coarsest(model.graph, cache_dtype)
    if not changed or dtype == "int8":
        return None
    return "unrounded" if dtype == "float32" else dtype


def _coarsest(graph: ir.Graph, cache_dtype: str) -> str:
    found = {value.dtype for value in graph.initializers.values()}
    found |= {
        ir.DataType(node.attributes.get_int("to", 0)) for node in graph if is_op(node, "Cast")
    }
    names = {name for dtype, name in _NAMES.items() if dtype in found} | {cache_dtype}
    if "bfloat16" not in names and any(_rounds_to_int8(node) for node in graph.all_nodes()):
        return "int8"
    return next((name for name in _NAMES.values() if name in names), "float32")


def _rounds_to_int8(node: ir.Node) -> bool:
    """Whether it rounds activations to 8 bits, so that the last bit of a sum may become a step."""
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("accuracy_level", 0) == _INT8_ACTIVATIONS
    if node.op_type == "DynamicQuantizeLinear" and not node.outputs[0].uses():
        return False  # only its scale is read
    return node.op_type in _ROUNDED_TO_INT8


class UnroundActivationsPass(ir.passes.InPlacePass):
    """DynamicQuantizeLinear before MatMulInteger, and MatMulNBits with int8 activations.

    Weights stay as they are, so this is no other model to whoever wires its attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed, source = False, GraphBuilder(model.graph, "source")
        for node in list(model.graph):
            if node.op_type == "MatMulNBits" and node.attributes.get_int(_ACCURACY, 0) > 1:
                node.attributes.add(ir.AttrInt64(_ACCURACY, _FLOAT32_ACTIVATIONS))
                changed = True
            elif is_op(node, "DynamicQuantizeLinear") and _products(node):
                _unround(source.at(node), node)
                changed = True
        return ir.passes.PassResult(model, changed)


def _products(node: ir.Node) -> list[ir.Node]:
    """Those that read the rounded numbers; none where something else does."""
    uses = list(node.outputs[0].uses())
    fits = all(is_op(use.node, "MatMulInteger") and use.idx == 0 for use in uses)
    return [use.node for use in uses] if fits else []


def _unround(build: GraphBuilder, node: ir.Node) -> None:
    """`x / scale` instead of `round(x / scale) + zero point`, from which the latter is taken."""
    steps = build.op("Div", optional_input(node, 0), node.outputs[1])
    build.graph.insert_after(node, build.nodes)
    for product in _products(node):
        build = build.at(product)
        weight, zero = optional_input(product, 1), optional_input(product, 3)
        assert weight is not None
        numbers = build.cast(weight, ir.DataType.FLOAT)
        if zero is not None:
            numbers = build.op("Sub", numbers, build.cast(zero, ir.DataType.FLOAT))
        product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        build.replace(product, build.op("MatMul", steps, numbers))
