"""Our own operators, whichever role a layer has: what the Hugging Face route and exports hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.attention.lengths import PROMPT_LENGTH
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Layout,
    MaskClass,
    MatchContext,
    NodeLengths,
    Operand,
)
from trianglemix.exporter.graph.attention_node import AttentionNode, append_operator
from trianglemix.exporter.graph.fold_rotation import canonical_rows
from trianglemix.exporter.graph.walk import optional_input
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._lengths import check_lengths
from trianglemix.exporter.patterns._node_walk import keys_and_values
from trianglemix.exporter.patterns._site_pattern import SitePattern, packing_trouble

_MAY_BE_PACKED: Final = ("key", "value")


class OwnOperatorPattern(SitePattern):
    """Anchors on a node of one operator, whose role the layer does not keep: roles are chosen anew.

    An exported model has the graph input `prompt_length`, and its nodes' lengths are kept. A
    fresh one (Hugging Face route) gets its lengths from the attention mask, like any source.
    """

    def trouble(self, node: ir.Node) -> str | None:
        for index, name in enumerate(contract.INPUTS):
            if optional_input(node, index) is None and name not in _MAY_BE_PACKED:
                return f"its input {name} is not connected, which no exported model leaves out"
        if any(value.uses() or value.is_graph_output() for value in node.outputs[3:]):
            return "its output block_mask is read, which an export leaves out"
        return packing_trouble(node)

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        exported = any(value.name == PROMPT_LENGTH for value in context.graph.inputs)
        own = AttentionNode(node)
        seqlens, total = own.seqlens_k, own.total_sequence_length
        build = context.builder(node)
        lengths = None
        if exported:
            lengths = NodeLengths(seqlens, total, own.prompt_length, own.first_valid)
        else:
            check_lengths(seqlens, total, context)
            seqlens = _whole_rows(build, seqlens, total)
        values = canonical_rows(build, own, seqlens)
        query, *rows = (Operand(value, Layout.FLAT) for value in values)
        cached = keys_and_values(node, (rows[0], rows[1]), (3, 4), context)
        return replace(
            self.site(node, own.shape, query, cached),
            mask=MaskClass(_own_window(own, exported)),
            lengths=lengths,
            prologue=tuple(build.nodes),
        )


def _own_window(node: AttentionNode, exported: bool) -> int | None:
    """The window of a layer that the source model windows: no sinks, no dense last rows ever.

    A fresh file of the Hugging Face route has no triangle layers, so a window there is a source's.
    """
    pattern = node.rule
    if not isinstance(pattern, TrianglePattern):
        return None
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


def dense_attention(
    build: GraphBuilder, layer: _example.ExampleLayer, attention: Attention | BlockSparse
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A fresh layer of the pattern's example: output, present key and present value."""
    total = build.cast(build.dimension(layer.attention_mask, 1), ir.DataType.INT32)
    count = build.reduce("ReduceSum", build.cast(layer.attention_mask, ir.DataType.INT32), 1)
    none = build.op("Sub", count, count)
    end = build.op("Add", none, total)
    node = append_operator(
        build,
        [layer.query, layer.key, layer.value, layer.past_key, layer.past_value,
         build.op("Sub", end, build.int32(1)), total, end, none],
        attention,
    )  # fmt: skip
    return node.outputs[0], node.outputs[1], node.outputs[2]
