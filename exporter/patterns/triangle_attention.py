"""Our own operator, dense or triangle: what the Hugging Face route writes, and exported models."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, OP_TYPE
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.attention.lengths import PROMPT_LENGTH
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Example,
    Layout,
    MaskClass,
    MatchContext,
    NodeLengths,
    Operand,
)
from trianglemix.exporter.graph.fold_rotation import canonical_rows
from trianglemix.exporter.graph.triangle_node import TriangleNode, append_operator
from trianglemix.exporter.graph.walk import optional_input
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._lengths import check_lengths
from trianglemix.exporter.patterns._node_walk import keys_and_values
from trianglemix.exporter.patterns._site_pattern import SitePattern, packing_trouble

_MAY_BE_PACKED: Final = ("key", "value")


class TriangleAttentionPattern(SitePattern):
    """Anchors on the node.

    An exported model has the graph input `prompt_length`, and its nodes' lengths are kept. A
    fresh one (Hugging Face route) gets its lengths from the attention mask, like any source.
    """

    name = "triangle_attention"
    anchors = frozenset({(contract.DOMAIN, OP_TYPE)})

    def trouble(self, node: ir.Node) -> str | None:
        for index, name in enumerate(contract.INPUTS):
            if optional_input(node, index) is None and name not in _MAY_BE_PACKED:
                return f"its input {name} is not connected, which no exported model leaves out"
        return packing_trouble(node)

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        exported = any(value.name == PROMPT_LENGTH for value in context.graph.inputs)
        triangle = TriangleNode(node)
        seqlens, total = triangle.seqlens_k, triangle.total_sequence_length
        build = context.builder(node)
        lengths = None
        if exported:
            lengths = NodeLengths(seqlens, total, triangle.prompt_length, triangle.first_valid)
        else:
            check_lengths(seqlens, total, context)
            seqlens = _whole_rows(build, seqlens, total)
        values = canonical_rows(build, triangle, seqlens)
        query, *rows = (Operand(value, Layout.FLAT) for value in values)
        cached = keys_and_values(node, (rows[0], rows[1]), (3, 4), context)
        return replace(
            self.site(node, triangle.shape, query, cached),
            mask=MaskClass(_own_window(triangle, exported)),
            lengths=lengths,
            prologue=tuple(build.nodes),
        )

    def example(self) -> Example:
        return _example.build_example(_dense_attention, opset=17, domains=(contract.DOMAIN,))


PATTERN: Final = TriangleAttentionPattern()


def _own_window(node: TriangleNode, exported: bool) -> int | None:
    """The window of a layer that the source model windows: no sinks, no dense last rows ever.

    A fresh file of the Hugging Face route has no triangle layers, so a window there is a source's.
    """
    pattern = node.pattern
    bare = not pattern.num_sink_tokens and pattern.num_last_tokens == 1
    if pattern.is_dense or not bare:
        return None
    return pattern.sliding_window_size if node.never_last or not exported else None


def _whole_rows(build: GraphBuilder, seqlens: ir.Value, total: ir.Value) -> ir.Value:
    """`total - 1` for every row of `[B]`: where the lengths from the mask put new tokens.

    The node's own lengths may count real tokens only. A rotation by those would turn the rows of
    a left-padded prompt by other slots than those of the steps after it.
    """
    none = build.op("Sub", seqlens, seqlens)
    return build.op("Add", none, build.op("Sub", total, build.int32(1)))


def _dense_attention(
    build: GraphBuilder, layer: _example.ExampleLayer
) -> tuple[ir.Value, ir.Value, ir.Value]:
    total = build.cast(build.dimension(layer.attention_mask, 1), ir.DataType.INT32)
    count = build.reduce("ReduceSum", build.cast(layer.attention_mask, ir.DataType.INT32), 1)
    none = build.op("Sub", count, count)
    end = build.op("Add", none, total)
    node = append_operator(
        build,
        [layer.query, layer.key, layer.value, layer.past_key, layer.past_value,
         build.op("Sub", end, build.int32(1)), total, end, none],
        Attention(_example.SHAPE, DENSE_PATTERN),
    )  # fmt: skip
    return node.outputs[0], node.outputs[1], node.outputs[2]
