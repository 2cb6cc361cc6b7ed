"""`com.microsoft::MultiHeadAttention`, as fusers for ONNX Runtime write it."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Example,
    Layout,
    MatchContext,
    Operand,
)
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import needed_input, optional_input
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._carried import Carried, anything, at_least, only
from trianglemix.exporter.patterns._node_measure import measured
from trianglemix.exporter.patterns._node_walk import head_shape, keys_and_values
from trianglemix.exporter.patterns._site_pattern import (
    SitePattern,
    cache_trouble,
)

_DOMAIN: Final = "com.microsoft"
_QUERY, _KEY, _VALUE, _PAST = 0, 1, 2, (6, 7)
_HIDES: Final = -1e4
_CARRIED: Final = Carried(
    inputs=("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key",
            "past_value", "past_sequence_length", "cache_indirection"),
    outputs=("output", "present_key", "present_value", "qk"),
    refused={"bias": "", "past_sequence_length": "", "cache_indirection": "", "qk": ""},
    attributes={
        "num_heads": at_least(1),
        "scale": anything,
        "unidirectional": only(0, 1),
        "mask_filter_value": lambda value: value <= _HIDES,
    },
)  # fmt: skip


class MultiHeadAttentionPattern(SitePattern):
    """Anchors on the node; keys and values repeated before it are read without the repeat."""

    name = "multi_head_attention"
    anchors = frozenset({(_DOMAIN, "MultiHeadAttention")})

    def trouble(self, node: ir.Node) -> str | None:
        if optional_input(node, _KEY) is None or optional_input(node, _VALUE) is None:
            return "its queries, keys and values come packed in one input"
        return _CARRIED.trouble(node) or cache_trouble(node, _PAST)

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        """Without a cache before it, the node has as many key/value heads as query heads."""
        operands = (_operand(node, _KEY), _operand(node, _VALUE))
        cached = keys_and_values(node, operands, _PAST, context)
        heads = node.attributes.get_int("num_heads", 0)
        query = Operand(needed_input(node, _QUERY), Layout.FLAT)
        return measured(self.site(node, head_shape(heads, heads, cached), query, cached), context)

    def example(self) -> Example:
        return _example.build_example(_attention, opset=20, domains=(_DOMAIN,))


PATTERN: Final = MultiHeadAttentionPattern()


def _operand(node: ir.Node, index: int) -> Operand:
    value = needed_input(node, index)
    return Operand(value, Layout.BHSD if rank(value) == 4 else Layout.FLAT)


def _attention(
    build: GraphBuilder, layer: _example.ExampleLayer
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
