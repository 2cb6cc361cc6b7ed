"""Rows of sparse tiles, one request at a time: a call of the operator each.

A block-sparse layer's rows of one request begin at a tile's edge of its prompt, so they are a call
by themselves: it chooses the blocks of the same tiles, from the same sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.pytorch.block_sparse import block_sparse_attention
from trianglemix.pytorch.layout import Rows
from trianglemix.vllm.row_split import Segment
from trianglemix.vllm.segments import SegmentTensors

SegmentKernel = Callable[[Tensor, Tensor, Segment, Tensor], None]
"""`query [n, H, D]` of a segment, the pages `[1, pages]` of its request, the segment, into `output
[n, H, D]`."""
Gather = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The pages `[pages]` of a request, a number `T` -> keys and values `[1, G, T, D]` of its first `T`
tokens."""


def attend_sparse(
    query: Tensor, segments: SegmentTensors, kernel: SegmentKernel, output: Tensor
) -> None:
    """`query [rows, H, D]` of the segments, into `output [rows, H, D]`."""
    begin = 0
    for number, segment in enumerate(segments.segments):
        piece = slice(begin, begin + segment.rows)
        kernel(query[piece], segments.table[number : number + 1], segment, output[piece])
        begin += segment.rows


def rows_of(segment: Segment) -> Rows:
    """Where the rows of a segment lie in its prompt."""
    return Rows(segment.keys - segment.rows, (0,), (segment.prompt_length,))


def attend_gathered(
    gather: Gather,
    attention: BlockSparse,
    query: Tensor,
    table: Tensor,
    segment: Segment,
    output: Tensor,
) -> None:
    """A `SegmentKernel` on keys that are gathered first, by what the device has in PyTorch."""
    key, value = gather(table[0], segment.keys)
    rows = query[None].transpose(1, 2)
    found = block_sparse_attention(rows, key, value, rows_of(segment), attention)
    output.copy_(found[0].transpose(0, 1))
