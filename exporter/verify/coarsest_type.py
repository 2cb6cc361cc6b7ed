"""The coarsest float type that a model rounds its numbers to, whatever its inputs' types are."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from trianglemix.exporter.graph.walk import is_op
from trianglemix.exporter.verify.unround import UnroundActivationsPass

_ROUNDED_TO_INT8 = frozenset(
    {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
     "QAttention", "QuantizeLinear", "QLinearMatMul"}
)  # fmt: skip
_INT8_ACTIVATIONS = 4  # of MatMulNBits
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
