"""Lengths for a node without a mask operand: every row of the batch has all the keys there are."""

from __future__ import annotations

import onnx_ir as ir
from trianglemix.exporter.attention.sites import MatchContext, NodeLengths
from trianglemix.exporter.graph.builder import NodeBuilder


def full_lengths(context: MatchContext, build: NodeBuilder) -> NodeLengths:
    """No padding is skipped, whatever the graph's attention mask holds; as its source has it."""
    mask = context.roles.attention_mask
    ends, whole = ("full_ends", mask), ("full_total", mask)
    if whole not in context.shared:
        total = build.cast(build.dimension(mask, 1), ir.DataType.INT32)
        last = build.op("Sub", total, build.int32(1))
        context.shared[whole] = total
        context.shared[ends] = build.op("Expand", last, build.dimension(mask, 0))
    return NodeLengths(context.shared[ends], context.shared[whole])
