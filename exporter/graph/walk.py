"""Reading a graph backwards and forwards from a node: constants, scalar factors, heads, caches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.errors import RefusedError

_SILENT = frozenset({"Cast", "Identity", "Dropout"})
_KEEPS_TYPE = (
    "MatMul", "Mul", "Div", "Add", "Sub", "Neg", "Concat", "Split", "Identity", "Dropout",
    "Transpose", "Reshape", "Tanh", "Softmax", "LayerNormalization", "Attention",
    "RotaryEmbedding", "RMSNormalization",
)  # fmt: skip
_OF_TWO = ("MatMul", "Mul", "Div", "Add", "Sub", "Concat")
_KEEPS_TYPE_CONTRIB = (
    "MatMulNBits", "FusedMatMul", "Attention", "MultiHeadAttention", "GroupQueryAttention",
    "RotaryEmbedding", "SkipLayerNormalization",
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
)  # fmt: skip


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is a standard operator of one of these types."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, if it is a standard operator of one of these types."""
    node = None if value is None else value.producer()
    return node if is_op(node, *op_types) else None


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """An input that a node may leave out, by an empty name or by ending before it."""
    return node.inputs[index] if index < len(node.inputs) else None


def static_size(value: ir.Value | None, axis: int) -> int | None:
    """A dimension that the file states as a number."""
    shape = None if value is None else value.shape
    if shape is None or axis >= len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def dtype_of(value: ir.Value, steps: int = 16) -> ir.DataType | None:
    """A value's element type: as the file states it, or as the nodes that make it tell it."""
    node = value.producer()
    if value.dtype is not None or node is None or steps == 0:
        return value.dtype
    if is_op(node, "Cast"):
        return ir.DataType(node.attributes.get_int("to", 0))
    if is_op(node, "Where"):
        return dtype_of(needed_input(node, 1), steps - 1)
    contrib = node.domain == "com.microsoft" and node.op_type in _KEEPS_TYPE_CONTRIB
    if not contrib and not is_op(node, *_KEEPS_TYPE):
        return None
    sources = node.inputs[: 2 if is_op(node, *_OF_TWO) else 1]
    found = (dtype_of(source, steps - 1) for source in sources if source is not None)
    return next((dtype for dtype in found if dtype is not None), None)


def needed_input(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator's definition requires.

    Raises:
        RefusedError: it is not there, so the graph is not valid ONNX.
    """
    value = optional_input(node, index)
    if value is None:
        raise RefusedError(
            f"node {node.name} ({node.op_type}) lacks its input {index}: the graph is not valid; "
            "export the model again"
        )
    return value


def is_constant(value: ir.Value | None) -> bool:
    """Whether the file holds the value; an input that was left out counts."""
    return value is None or ir.convenience.get_const_tensor(value) is not None


def small_constant(value: ir.Value | None, limit: int = 64) -> np.ndarray | None:
    """A constant of at most `limit` elements, as an array; None for everything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > limit else constant_array(tensor)


def constant_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """A constant's numbers, from the proto or from a data file.

    The loader has checked where the file lies. onnx_ir would check again where a base folder is
    given, and refuse what ONNX Runtime reads: files with several hard links, links of a cache.
    """
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(
            tensor.path, tensor.offset, tensor.length, tensor.dtype,
            shape=tensor.shape, name=tensor.name,
        )  # fmt: skip
    return tensor.numpy()


def content_values(graph: ir.Graph) -> set[ir.Value]:
    """The values that depend on what the graph's inputs hold, not only on shapes and constants."""
    content = set(graph.inputs)
    content.difference_update(graph.initializers.values())
    for node in graph:
        if not is_op(node, "Shape", "Size") and any(value in content for value in node.inputs):
            content.update(node.outputs)
    return content


def is_scalar_factor(value: ir.Value, content: Collection[ir.Value]) -> bool:
    """A value that one number scales by: a constant of one element, or one computed from shapes."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.size == 1
    return value not in content and value.producer() is not None


@dataclass(frozen=True)
class Factor:
    """A scalar that a value was multiplied by, or divided by."""

    value: ir.Value
    divides: bool = False


def peel_factor(
    value: ir.Value, content: Collection[ir.Value]
) -> tuple[ir.Value, Factor | None] | None:
    """The value before a cast, or before a product with a scalar; None when neither made it."""
    node = value.producer()
    if node is None:
        return None
    if is_op(node, *_SILENT):
        return needed_input(node, 0), None
    if is_op(node, "Mul", "Div"):
        left, right = needed_input(node, 0), needed_input(node, 1)
        if is_scalar_factor(right, content):
            return left, Factor(right, divides=node.op_type == "Div")
        if node.op_type == "Mul" and is_scalar_factor(left, content):
            return right, Factor(left)
    return None


def layout_chain(value: ir.Value) -> list[ir.Value]:
    """The value and what only moves its numbers, as long as nothing else reads it."""
    chain = [value]
    while True:
        readers = [node for node in chain[-1].consumers() if not is_op(node, "Shape", "Size")]
        if len(readers) != 1 or chain[-1].is_graph_output():
            return chain
        node, last = readers[0], chain[-1]
        moves = is_op(node, "Reshape", "Transpose", *_SILENT) and node.inputs[0] is last
        if not moves and not _zeroes_rows(node, last):
            return chain
        chain.append(node.outputs[0])


def _zeroes_rows(node: ir.Node, value: ir.Value) -> bool:
    """`Where(c, 0, x)`: how some exporters treat a row that sees no key (the operator gives 0)."""
    if not is_op(node, "Where") or node.inputs[2] is not value:
        return False
    zero = small_constant(node.inputs[1], limit=1)
    return zero is not None and float(zero.reshape(())) == 0.0
