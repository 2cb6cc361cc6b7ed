"""The standard operator `Attention` (opset 23 and later), its cache inside or outside the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.exporter.cutout import CutError
from trianglemix.exporter.graph_roles import rank
from trianglemix.exporter.node_builder import NodeBuilder
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._node_measure import (
    NodeSite,
    measure_node,
    scale_or_default,
)
from trianglemix.exporter.patterns._node_walk import (
    KeysAndValues,
    find_appended,
    head_shape,
    static_size,
)
from trianglemix.exporter.sites import (
    AttentionSite,
    Example,
    Layout,
    MatchContext,
    Operand,
    Refusal,
)
from trianglemix.exporter.walk import needed_input

_MASK, _PAST_KEY, _PAST_VALUE, _NONPAD = 3, 4, 5, 6


class AttentionPattern:
    """Anchors on the node; its mask is measured, whatever it is made of."""

    name = "attention"
    anchors = frozenset({("", "Attention")})

    def match(self, node: ir.Node, context: MatchContext) -> AttentionSite | Refusal:
        label = node.name or node.outputs[0].name or node.op_type
        trouble = _trouble(node)
        if trouble is not None:
            return Refusal(label, trouble)
        try:
            return self._site(node, context)
        except (CutError, ConfigurationError) as error:
            return Refusal(label, str(error))

    def example(self) -> Example:
        return _example.build_example(_attention, opset=23)

    def _site(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        operands = _operands(node, context)
        shape = _shape_of(node, operands)
        site = NodeSite(
            anchor=node,
            shape=shape,
            scale=scale_or_default(node.attributes.get_float("scale", 0.0), shape.head_size),
            softcap=node.attributes.get_float("softcap", 0.0),
            query=operands.query,
            key=operands.cached.key,
            value=operands.cached.value,
            past=operands.cached.past,
            present=operands.cached.present,
        )
        mask, output = measure_node(site, context)
        return AttentionSite(
            layer=-1,
            form=self.name,
            anchor=node,
            shape=shape,
            scale=site.scale,
            softcap=site.softcap,
            mask=mask,
            query=site.query,
            key=site.key,
            value=site.value,
            past=site.past,
            present=site.present,
            output=output,
        )


PATTERN: Final = AttentionPattern()


def _trouble(node: ir.Node) -> str | None:
    """Why the node's meaning is not the operator's, if so."""
    if len(node.inputs) > _NONPAD and node.inputs[_NONPAD] is not None:
        return (
            "its input nonpad_kv_seqlen stands for a static cache (written by TensorScatter), "
            "which has no counterpart in TriangleAttention; export with a growing cache"
        )
    if len(node.outputs) > 3 and node.outputs[3].uses():
        return "its output qk_matmul_output is used, which TriangleAttention never makes"
    pasts = [_input(node, index) is not None for index in (_PAST_KEY, _PAST_VALUE)]
    if pasts[0] != pasts[1]:
        return "it has only one of past_key and past_value"
    if all(pasts) and len(node.outputs) < 3:
        return "it does not hand out its present key and value"
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


@dataclass(frozen=True)
class _Operands:
    query: Operand
    cached: KeysAndValues


def _operands(node: ir.Node, context: MatchContext) -> _Operands:
    """Queries, and keys and values with the cache, wherever it is."""
    flat = "q_num_heads" in node.attributes
    query = needed_input(node, 0)
    if not flat and rank(query) == 3:
        raise CutError("its inputs have three axes, but it has no attribute q_num_heads")
    layout = Layout.FLAT if flat and rank(query) != 4 else Layout.BHSD
    operands = [Operand(needed_input(node, index), layout) for index in range(3)]
    past_key, past_value = _input(node, _PAST_KEY), _input(node, _PAST_VALUE)
    if past_key is None or past_value is None:
        return _Operands(operands[0], find_appended(operands[1], operands[2], context))
    present = (node.outputs[1], node.outputs[2])
    cached = KeysAndValues(operands[1], operands[2], (past_key, past_value), present)
    return _Operands(operands[0], cached)


def _shape_of(node: ir.Node, operands: _Operands) -> AttentionShape:
    """With four axes the attributes do not say how many heads there are; the shapes do."""
    heads = node.attributes.get_int("q_num_heads", 0) or static_size(operands.query.value, 1) or 0
    return head_shape(heads, node.attributes.get_int("kv_num_heads", 0), operands.cached)


def _attention(
    build: NodeBuilder, layer: _example.ExampleLayer
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Three axes, the cache inside the node, an additive mask."""
    node = build.node(
        "Attention",
        [layer.query, layer.key, layer.value, _example.additive_mask(build, layer),
         layer.past_key, layer.past_value],
        attributes={"q_num_heads": _example.SHAPE.num_heads,
                    "kv_num_heads": _example.SHAPE.kv_num_heads},
        num_outputs=3,
    )  # fmt: skip
    return node.outputs[0], node.outputs[1], node.outputs[2]
