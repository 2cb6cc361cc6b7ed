"""Where a graph's rows begin and end: the length inputs of every TriangleAttention node.

From an attention mask `[B, T]` by the rule of a growing cache (every row's new tokens are the
last `S` of `T`; that is what an exported decoder does, whatever the padding)::

    seqlens_k     = T - 1                     first_valid   = index of the row's first 1
    row_end       = index after the last 1    prompt_length = row_end, unless the caller says more

A mask whose ones have a hole between them cannot be said by the operator: its row gets
`seqlens_k = -2`, an impossible length that the CPU kernel refuses with a text; where the kernel
does not look (CUDA, the function body), the last attention gives that row NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import NodeLengths
from trianglemix.exporter.graph.attention_node import NEVER_LAST
from trianglemix.exporter.graph.roles import GraphRoles

PROMPT_LENGTH: Final = "prompt_length"
"""Optional graph input `[B]` int32: the prompt's length; 0 or less (the default) = `row_end`."""
IMPOSSIBLE_SEQLEN: Final = -2


@dataclass(frozen=True)
class Lengths:
    """The length inputs of a node (int32), and `row_end [B]`: the end of the row's real tokens."""

    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    prompt_length: ir.Value
    first_valid: ir.Value
    row_end: ir.Value


def lengths_from_mask(build: GraphBuilder, roles: GraphRoles, prompt_length: ir.Value) -> Lengths:
    """Lengths of a graph whose cache grows by `S` slots a call for every row."""
    real = build.cast(roles.attention_mask, ir.DataType.BOOL)  # [B, T]
    total_64 = build.dimension(roles.attention_mask, 1)
    total = build.cast(total_64, ir.DataType.INT32)  # [1]
    index = build.cast(build.range_to(total_64), ir.DataType.INT32)
    zero, one = build.int32(0), build.int32(1)
    after = build.op("Where", real, build.op("Add", index, one), zero)
    row_end = build.reduce("ReduceMax", after, 1)
    first_valid = build.reduce("ReduceMin", build.op("Where", real, index, total), 1)
    count = build.reduce("ReduceSum", build.cast(real, ir.DataType.INT32), 1)
    span = build.op("Max", build.op("Sub", row_end, first_valid), zero)  # 0: a row of pads only
    unbroken = build.op("Equal", count, span)
    last_slot = build.op("Sub", total, one)
    seqlens = build.op("Where", unbroken, last_slot, build.int32(IMPOSSIBLE_SEQLEN))
    return Lengths(
        seqlens_k=seqlens,
        total_sequence_length=total,
        prompt_length=_told_or(build, prompt_length, row_end),
        first_valid=first_valid,
        row_end=row_end,
    )


def lengths_from_node(
    build: GraphBuilder, source: NodeLengths, roles: GraphRoles, prompt_length: ir.Value
) -> Lengths:
    """Lengths that the source's nodes carry; what they lack is completed.

    `prompt_length` of the source is kept: it is wired to the graph input already.
    """
    end = build.op("Add", source.seqlens_k, build.int32(1))
    first_valid = source.first_valid
    if first_valid is None:
        first_valid = build.op("Sub", end, end)  # provably 0
    row_end = end
    if source.prompt_length is not None:  # exported before: the mask says where rows end
        row_end = _row_end(build, roles)
    return Lengths(
        seqlens_k=source.seqlens_k,
        total_sequence_length=source.total_sequence_length,
        prompt_length=source.prompt_length or _told_or(build, prompt_length, end),
        first_valid=first_valid,
        row_end=row_end,
    )


def add_prompt_length_input(graph: ir.Graph) -> ir.Value:
    """The optional graph input, with its default of `[0]`; the existing one if there is one."""
    for value in graph.inputs:
        if value.name == PROMPT_LENGTH:
            return value
    value = ir.Value(
        name=PROMPT_LENGTH,
        type=ir.TensorType(ir.DataType.INT32),
        shape=ir.Shape(["prompt_length_batch"]),
        const_value=ir.tensor(np.zeros(1, np.int32), name=PROMPT_LENGTH),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def never_last(build: GraphBuilder, first_valid: ir.Value) -> ir.Value:
    """`prompt_length [B]` of a layer that only slides: no row is ever one of the last ones."""
    return build.op("Max", first_valid, build.int32(NEVER_LAST))


def nan_where(build: GraphBuilder, bad_rows: ir.Value, rows: ir.Value) -> ir.Value:
    """`rows` `[B, S, width]` with NaN in the rows of the batch where `bad_rows` `[B]` is true.

    It makes wrong input loud on devices whose kernels do not look at lengths.
    """
    nan = build.op("CastLike", build.scalar(np.nan), rows)
    marked = build.op("Where", build.unsqueeze(bad_rows, 1, 2), nan, rows)
    marked.type = rows.type
    return marked


def _told_or(build: GraphBuilder, told: ir.Value, otherwise: ir.Value) -> ir.Value:
    return build.op("Where", build.op("Greater", told, build.int32(0)), told, otherwise)


def _row_end(build: GraphBuilder, roles: GraphRoles) -> ir.Value:
    total = build.dimension(roles.attention_mask, 1)
    index = build.range_to(total)
    after = build.op("Add", build.cast(index, ir.DataType.INT32), build.int32(1))
    real = build.cast(roles.attention_mask, ir.DataType.BOOL)
    return build.reduce("ReduceMax", build.op("Where", real, after, build.int32(0)), 1)
