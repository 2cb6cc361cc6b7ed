"""The rows of a decoder after its last attention: what one row needs, computed for one row only.

Behind the last attention nothing mixes the tokens any more (projection, residuals, norms, the MLP,
the LM head), so with last-token logits all of it may run on the last row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.attention_node import is_attention
from trianglemix.exporter.graph.walk import is_constant, is_op, needed_input, small_constant

_CONTRIB: Final = "com.microsoft"
_PER_ELEMENT: Final = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Sigmoid",
     "Tanh", "Erf", "Relu", "Gelu", "Cast", "Identity", "CastLike", "Max", "Min", "Softplus"}
)  # fmt: skip
_NORMS: Final = frozenset(
    {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
     "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"}
)  # fmt: skip
_CONTRIB_PER_ELEMENT: Final = frozenset(
    {"SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "QuickGelu", "FastGelu", "Gelu",
     "BiasGelu"}
)  # fmt: skip


@dataclass(frozen=True)
class DecoderTail:
    """Nodes that treat each row apart, and the `[B, S, width]` values that enter them."""

    nodes: frozenset[ir.Node]
    entries: tuple[ir.Value, ...]

    def projection_sizes(self) -> int:
        """Sum of `K * N` over the products with weights inside."""
        sizes = 0
        for node in self.nodes:
            if is_op(node, "MatMul"):
                tensor = ir.convenience.get_const_tensor(needed_input(node, 1))
                sizes += 0 if tensor is None else int(tensor.size)
            elif node.op_type == "MatMulNBits":
                sizes += int(node.attributes["K"].value) * int(node.attributes["N"].value)
        return sizes


def find_tail(hidden: ir.Value) -> DecoderTail:
    """The largest tail that ends in `hidden` `[B, S, width]`; an empty one where none is certain.

    It is certain when what enters is the output of one attention and one residual stream: both
    are `[B, S, width]`, since their projections are added to each other inside.
    """
    nothing = DecoderTail(frozenset(), (hidden,))
    nodes = _row_wise_nodes(hidden)
    made = {value for node in nodes for value in node.outputs}
    entries: dict[ir.Value, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in made and not is_constant(value):
                entries[value] = None
    attention = [value for value in entries if _is_attention_output(value)]
    if len(entries) != 2 or len(attention) != 1:
        return nothing
    return DecoderTail(frozenset(nodes), tuple(entries))


def _row_wise_nodes(hidden: ir.Value) -> dict[ir.Node, None]:
    """Nodes behind `hidden` that treat rows apart and whose results only such nodes read."""
    nodes: dict[ir.Node, None] = {}
    pending = [hidden]
    while pending:
        node = pending.pop().producer()
        if node is None or node in nodes or not _treats_rows_apart(node):
            continue
        if not all(_stays_inside(value, nodes, hidden) for value in node.outputs):
            continue
        nodes[node] = None
        pending.extend(value for value in node.inputs if value is not None)
        # a value with several readers is looked at again when the last of them is inside
    return nodes


def _stays_inside(value: ir.Value, nodes: dict[ir.Node, None], hidden: ir.Value) -> bool:
    if value.is_graph_output():
        return False
    return value is hidden or all(reader in nodes for reader in value.consumers())


def _treats_rows_apart(node: ir.Node) -> bool:
    if node.domain == _CONTRIB:
        return node.op_type in _CONTRIB_PER_ELEMENT or node.op_type == "MatMulNBits"
    if is_op(node, *_PER_ELEMENT):
        return all(_is_row_like(value) for value in node.inputs)
    if is_op(node, "Split"):
        return node.attributes.get_int("axis", 0) in (-1, 2)
    if is_op(node, "MatMul"):
        return is_constant(node.inputs[1])
    if is_op(node, *_NORMS):
        return node.attributes.get_int("axis", -1) in (-1, 2)
    if is_op(node, "ReduceMean", "ReduceSum"):
        return bool(node.attributes.get_int("keepdims", 1)) and _reduced_axes(node) in ([-1], [2])
    return False


def _is_row_like(value: ir.Value | None) -> bool:
    """Not a constant that differs from token to token."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is None or len(tensor.shape) <= 1 or tensor.size == 1


def _reduced_axes(node: ir.Node) -> list[int]:
    if len(node.inputs) > 1:
        axes = small_constant(node.inputs[1])
        return [] if axes is None else [int(axis) for axis in axes.reshape(-1)]
    return list(node.attributes.get_ints("axes", []))


def _is_attention_output(value: ir.Value) -> bool:
    """The flat output of an attention, or of the NaN guard behind it."""
    node = value.producer()
    if node is not None and is_op(node, "Where"):
        node = needed_input(node, 2).producer()
    return node is not None and is_attention(node)
