"""The standard operator `Attention` (opset 23 and later), its cache inside or outside the node."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Example,
    Layout,
    MatchContext,
    Operand,
)
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import needed_input, static_size
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._carried import Carried, anything, at_least, only
from trianglemix.exporter.patterns._node_mask import LEFT_WINDOW, RIGHT_WINDOW
from trianglemix.exporter.patterns._node_measure import measured
from trianglemix.exporter.patterns._node_walk import head_shape, keys_and_values
from trianglemix.exporter.patterns._site_pattern import (
    SitePattern,
    cache_trouble,
)

_PAST: Final = (4, 5)
_CARRIED: Final = Carried(
    inputs=("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"),
    outputs=("Y", "present_key", "present_value", "qk_matmul_output"),
    refused={
        "nonpad_kv_seqlen": "stands for a static cache (written by TensorScatter), which has no "
        "counterpart in TriangleAttention; export with a growing cache",
        "qk_matmul_output": "",
    },
    attributes={
        "is_causal": only(0, 1),
        "q_num_heads": at_least(1),
        "kv_num_heads": at_least(1),
        "scale": anything,
        "softcap": at_least(0.0),
        "softmax_precision": only(1, 10, 11, 16),  # types; the operator's softmax is float32
        LEFT_WINDOW: at_least(-1),
        RIGHT_WINDOW: at_least(-1),
        "qk_matmul_output_mode": anything,  # of an output that nothing reads
    },
)


class AttentionPattern(SitePattern):
    """Anchors on the node; its mask is measured, whatever it is made of."""

    name = "attention"
    anchors = frozenset({("", "Attention")})

    def trouble(self, node: ir.Node) -> str | None:
        return _CARRIED.trouble(node) or cache_trouble(node, _PAST)

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        """With four axes the attributes do not say how many heads there are; the shapes do."""
        layout = _layout(node)
        query, key, value = (Operand(needed_input(node, index), layout) for index in range(3))
        cached = keys_and_values(node, (key, value), _PAST, context)
        heads = node.attributes.get_int("q_num_heads", 0) or static_size(query.value, 1) or 0
        shape = head_shape(heads, node.attributes.get_int("kv_num_heads", 0), cached)
        return measured(self.site(node, shape, query, cached), context)

    def example(self) -> Example:
        return _example.build_example(_attention, opset=23)


PATTERN: Final = AttentionPattern()


def _layout(node: ir.Node) -> Layout:
    """Layout of queries, keys and values."""
    flat = "q_num_heads" in node.attributes
    axes = rank(needed_input(node, 0))
    if not flat and axes == 3:
        raise CutError("its inputs have three axes, but it has no attribute q_num_heads")
    return Layout.FLAT if flat and axes != 4 else Layout.BHSD


def _attention(
    build: GraphBuilder, layer: _example.ExampleLayer
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
