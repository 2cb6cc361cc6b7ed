"""The language model's head: the product that makes logits of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.graph.walk import is_constant, is_op, needed_input

_HEADS: Final = frozenset({("", "MatMul"), ("", "Gemm"), ("com.microsoft", "MatMulNBits")})
_AFTER_HEAD: Final = ("Cast", "Identity", "Mul", "Div", "Add", "Sub", "Tanh", "Reshape")


@dataclass(frozen=True)
class LanguageModelHead:
    """The product that makes logits; `hidden` `[B, S, hidden_size]` goes in."""

    node: ir.Node
    hidden: ir.Value
    hidden_size: int | None
    vocabulary_size: int | None


def find_head(roles: GraphRoles) -> LanguageModelHead | None:
    """Walks back from the logits over a bias, a softcap or a cast to the head's product."""
    vocabulary = _last_dimension(roles.logits)
    value: ir.Value | None = roles.logits
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if (node.domain, node.op_type) in _HEADS:
            return LanguageModelHead(
                node, needed_input(node, 0), _input_width(node), vocabulary or _output_width(node)
            )
        if not is_op(node, *_AFTER_HEAD):
            return None
        value = next((x for x in node.inputs if not is_constant(x)), None)
    return None


def _last_dimension(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape else None
    return size if isinstance(size, int) else None


def _weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    tensor = ir.convenience.get_const_tensor(needed_input(node, 1))
    return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def _input_width(node: ir.Node) -> int | None:
    if node.op_type == "MatMulNBits":
        return int(node.attributes["K"].value)
    shape = _weight_shape(node)
    if shape is None:
        return _last_dimension(needed_input(node, 0))
    return shape[1] if node.attributes.get_int("transB", 0) else shape[0]


def _output_width(node: ir.Node) -> int | None:
    if node.op_type == "MatMulNBits":
        return int(node.attributes["N"].value)
    shape = _weight_shape(node)
    return None if shape is None else shape[0 if node.attributes.get_int("transB", 0) else 1]
