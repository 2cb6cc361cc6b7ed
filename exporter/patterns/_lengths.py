"""Lengths of an attention node: its own, checked, or those of a node that has none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.attention_probe import CallSizes, ProbeInputs
from trianglemix.exporter.attention.cutout import CutError, cut_out, run_cut
from trianglemix.exporter.attention.sites import MatchContext, NodeLengths
from trianglemix.exporter.graph.roles import rank

_CALLS = (CallSizes(2, 5, 7), CallSizes(3, 1, 4), CallSizes(1, 6, 0))


def check_lengths(seqlens_k: ir.Value, total: ir.Value, context: MatchContext) -> int:
    """Every row's keys must end where the attention mask ends, in calls without padding.

    Lengths that the caller of the graph gives are taken as they are. Returns how many axes
    `seqlens_k` has: some exporters write `[B, 1]`.

    Raises:
        CutError: they are something else; the message holds the values.
    """
    cut = cut_out(context.graph, [], [seqlens_k, total])
    roles = context.roles
    known = {roles.input_ids, roles.attention_mask, roles.position_ids, *roles.caches}
    if any(value.is_graph_input() and value not in known for value in cut.inputs):
        return rank(seqlens_k) or 1
    axes = 1
    for sizes in _CALLS:
        ends, length = run_cut(cut, ProbeInputs(context).feeds(cut, sizes, {}))
        axes = ends.ndim
        rows = np.full(sizes.batch, sizes.total - 1)
        if not np.array_equal(ends.ravel(), rows) or not np.array_equal(
            length.ravel(), [sizes.total]
        ):
            raise CutError(
                f"its lengths are not the attention mask's: seqlens_k {ends.ravel()[:4]} and "
                f"total_sequence_length {length.ravel()[:4]} in a call of {sizes.total} tokens"
            )
    return axes


def full_lengths(context: MatchContext, build: GraphBuilder) -> NodeLengths:
    """No padding is skipped, whatever the graph's attention mask holds; as its source has it."""
    mask = context.roles.attention_mask
    ends, whole = ("full_ends", mask), ("full_total", mask)
    if whole not in context.shared:
        total = build.cast(build.dimension(mask, 1), ir.DataType.INT32)
        last = build.op("Sub", total, build.int32(1))
        context.shared[whole] = total
        context.shared[ends] = build.op("Expand", last, build.dimension(mask, 0))
    return NodeLengths(context.shared[ends], context.shared[whole])
