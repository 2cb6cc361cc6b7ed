"""`com.microsoft::MultiHeadAttention`, as fusers for ONNX Runtime write it."""

from __future__ import annotations

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
from trianglemix.exporter.patterns._node_walk import KeysAndValues, find_appended, head_shape
from trianglemix.exporter.sites import (
    AttentionSite,
    Example,
    Layout,
    MatchContext,
    Operand,
    Refusal,
)
from trianglemix.exporter.walk import needed_input

_DOMAIN: Final = "com.microsoft"
_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE = 0, 1, 2, 6, 7
_NOT_CARRIED: Final = {
    3: "bias",
    8: "past_sequence_length",
    9: "cache_indirection",
}


class MultiHeadAttentionPattern:
    """Anchors on the node; keys and values repeated before it are read without the repeat."""

    name = "multi_head_attention"
    anchors = frozenset({(_DOMAIN, "MultiHeadAttention")})

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
        return _example.build_example(_attention, opset=20, domains=(_DOMAIN,))

    def _site(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        cached = _keys_and_values(node, context)
        shape = _shape_of(node, cached)
        site = NodeSite(
            anchor=node,
            shape=shape,
            scale=scale_or_default(node.attributes.get_float("scale", 0.0), shape.head_size),
            softcap=0.0,
            query=Operand(needed_input(node, _QUERY), Layout.FLAT),
            key=cached.key,
            value=cached.value,
            past=cached.past,
            present=cached.present,
        )
        mask, output = measure_node(site, context)
        return AttentionSite(
            layer=-1,
            form=self.name,
            anchor=node,
            shape=shape,
            scale=site.scale,
            softcap=0.0,
            mask=mask,
            query=site.query,
            key=site.key,
            value=site.value,
            past=site.past,
            present=site.present,
            output=output,
        )


PATTERN: Final = MultiHeadAttentionPattern()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _trouble(node: ir.Node) -> str | None:
    """Why the node's meaning is not the operator's, if so."""
    for index, name in _NOT_CARRIED.items():
        if _input(node, index) is not None:
            return f"its input {name} has no counterpart in TriangleAttention"
    if _input(node, _KEY) is None or _input(node, _VALUE) is None:
        return "its queries, keys and values come packed in one input"
    if len(node.outputs) > 3 and node.outputs[3].uses():
        return "its output qk is used, which TriangleAttention never makes"
    pasts = [_input(node, index) is not None for index in (_PAST_KEY, _PAST_VALUE)]
    if pasts[0] != pasts[1]:
        return "it has only one of past_key and past_value"
    if all(pasts) and len(node.outputs) < 3:
        return "it does not hand out its present key and value"
    return None


def _keys_and_values(node: ir.Node, context: MatchContext) -> KeysAndValues:
    operands = []
    for index in (_KEY, _VALUE):
        value = needed_input(node, index)
        operands.append(Operand(value, Layout.BHSD if rank(value) == 4 else Layout.FLAT))
    past_key, past_value = _input(node, _PAST_KEY), _input(node, _PAST_VALUE)
    if past_key is None or past_value is None:
        return find_appended(operands[0], operands[1], context)
    present = (node.outputs[1], node.outputs[2])
    return KeysAndValues(operands[0], operands[1], (past_key, past_value), present)


def _shape_of(node: ir.Node, cached: KeysAndValues) -> AttentionShape:
    """Without a cache before it, the node has as many key/value heads as query heads."""
    heads = node.attributes.get_int("num_heads", 0)
    return head_shape(heads, heads, cached)


def _attention(
    build: NodeBuilder, layer: _example.ExampleLayer
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys and values repeated for their groups before the node, an additive mask."""
    present_key = _example.appended(build, layer.past_key, layer.key)
    present_value = _example.appended(build, layer.past_value, layer.value)
    rows = [
        _example.merged(build, _example.repeated(build, x)) for x in (present_key, present_value)
    ]
    output = build.op(
        "MultiHeadAttention",
        layer.query, *rows, None, None, _example.additive_mask(build, layer),
        domain=_DOMAIN,
        num_heads=_example.SHAPE.num_heads,
    )  # fmt: skip
    return output, present_key, present_value
