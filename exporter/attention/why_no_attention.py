"""Why a graph holds no attention that any pattern knows: what stands in its place, by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.foreign_operators import keeps_state
from trianglemix.exporter.graph.walk import is_op, optional_input, producer_of

_QUANTISED: Final = frozenset(
    {"MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
     "QAttention", "QGemm"}
)  # fmt: skip
_ADVICE: Final = (
    "the operator computes in floats; quantise the weights alone (onnxruntime's quantizers: "
    "extra_options={'MatMulConstBOnly': True})"
)
_MOVES: Final = ("Cast", "Identity", "Dropout", "Mul", "Reshape")


def clue(graph: ir.Graph, content: Collection[ir.Value]) -> str:
    """A clause about the first node that tells why; empty where none does."""
    for node in graph:
        for reads in _READERS:
            reason = reads(node, content)
            if reason is not None:
                return f"; node {node.name or node.outputs[0].name} ({node.op_type}) {reason}"
    return ""


def _quantised_product(node: ir.Node, content: Collection[ir.Value]) -> str | None:
    """Two activations multiplied as integers; one node makes each with scale and zero point."""
    given = [value for value in node.inputs if value is not None and value in content]
    if node.op_type not in _QUANTISED or len({value.producer() for value in given}) < 2:
        return None
    return f"multiplies quantised activations: {_ADVICE}"


def _rounded_product(node: ir.Node, content: Collection[ir.Value]) -> str | None:
    """A product of activations that were quantised and made floats again (QDQ)."""
    if not is_op(node, "MatMul", "Einsum"):
        return None
    rounded = [producer_of(value, "DequantizeLinear") for value in node.inputs]
    if not all(x is not None and x.inputs[0] in content for x in rounded):
        return None
    return f"multiplies activations that were quantised before (QDQ): {_ADVICE}"


def _other_denominator(node: ir.Node, content: Collection[ir.Value]) -> str | None:
    if not is_op(node, "Div") or producer_of(node.inputs[0], "Exp") is None:
        return None
    total = producer_of(node.inputs[1], "Add", "Max", "Clip")
    sums = [] if total is None else [producer_of(value, "ReduceSum") for value in total.inputs]
    if not any(x is not None and x.inputs[0] is node.inputs[0] for x in sums):
        return None
    return (
        "divides exponentials by more than their sum (attention sinks, softmax-plus-one), which "
        "the operator has no counterpart for"
    )


def _other_weights(node: ir.Node, content: Collection[ir.Value]) -> str | None:
    """`f(q k) v` with another function than softmax."""
    if not is_op(node, "MatMul") or optional_input(node, 1) not in content:
        return None
    value = node.inputs[0]
    for _ in range(6):
        made = None if value is None else value.producer()
        if is_op(made, "Sigmoid", "Relu", "Tanh") and made is not None:
            return (
                f"sums values with weights from {made.op_type}, not from a softmax, which the "
                "operator does not compute"
            ) if _is_product(made.inputs[0], content) else None  # fmt: skip
        if not is_op(made, *_MOVES) or made is None:
            return None
        value = made.inputs[0]
    return None


def _is_product(value: ir.Value | None, content: Collection[ir.Value]) -> bool:
    """Whether a product of two activations is a few steps behind a value."""
    for _ in range(6):
        node = None if value is None else value.producer()
        if node is None:
            return False
        if is_op(node, "MatMul"):
            return all(x in content for x in node.inputs)
        value = node.inputs[0]
    return False


def _state(node: ir.Node, content: Collection[ir.Value]) -> str | None:
    """A layer without keys and values."""
    return "keeps a state, not keys and values: there are none to leave out" if (
        keeps_state(node)
    ) else None  # fmt: skip


_READERS: Final[tuple[Callable[[ir.Node, Collection[ir.Value]], str | None], ...]] = (
    _quantised_product, _rounded_product, _other_denominator, _other_weights, _state,
)  # fmt: skip
