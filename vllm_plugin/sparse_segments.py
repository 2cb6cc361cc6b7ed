"""Rows of sparse tiles: their request's keys out of vLLM's pages, then the rule and its attention.

A block-sparse layer's rows of one request begin at a tile's edge of its prompt, so they are a call
of the operator by themselves: it chooses the blocks of the same tiles, from the same sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.pytorch.block_sparse import block_sparse_attention
from trianglemix.pytorch.layout import Rows
from trianglemix.vllm.segments import SegmentTensors

Gather = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The pages `[pages]` of a request, a number `T` -> keys and values `[1, G, T, D]` of its first `T`
tokens."""


def attend_sparse(
    query: Tensor,
    segments: SegmentTensors,
    gather: Gather,
    attention: BlockSparse,
    output: Tensor,
) -> None:
    """`query [rows, H, D]` of the segments, into `output [rows, H, D]`: one request at a time."""
    begin = 0
    for segment, table in zip(segments.segments, segments.table, strict=True):
        piece = slice(begin, begin + segment.rows)
        key, value = gather(table, segment.keys)
        rows = Rows(segment.keys - segment.rows, (0,), (segment.prompt_length,))
        found = block_sparse_attention(
            query[None, piece].transpose(1, 2), key, value, rows, attention
        )
        output[piece] = found[0].transpose(0, 1)
        begin += segment.rows
