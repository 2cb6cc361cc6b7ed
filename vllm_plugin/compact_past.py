"""Streaming rows on a CPU: their keys out of vLLM's pages, then attention in PyTorch.

What rows `[low, high)` of a prompt keep are the sinks and the positions from `low - window + 1` on.
Put side by side they are a shorter prompt with the same pattern: positions and the prompt's end
move by `low - window + 1 - sink`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.layout import Rows
from trianglemix.vllm.row_split import Segment


@dataclass(frozen=True)
class Pages:
    """One layer's pages `[pages, G, page, 2 D]`, keys before values inside a head's page.

    Keys lie transposed, `[D, page]`, values do not: the layout of vLLM's CPU kernels without tiles.
    """

    cache: Tensor
    head_size: int

    def read(self, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[1, G, n, D]` of the `positions [n]` of a request with these pages."""
        pages, G, page, _ = self.cache.shape
        halves = self.cache.reshape(pages, G, 2, page * self.head_size)
        number, slot = table[positions // page].long(), positions % page
        keys = halves[:, :, 0].view(pages, G, self.head_size, page)[number, :, :, slot]
        values = halves[:, :, 1].view(pages, G, page, self.head_size)[number, :, slot]
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]


def read_back(write: Callable[[Tensor, Tensor, Tensor, Tensor], None], pages: Pages) -> bool:
    """Whether `Pages` reads what the kernel `write(key, value, cache, slots)` puts there."""
    count, G, page, _ = pages.cache.shape
    n = count * page
    given = torch.randn(2, n, G, pages.head_size).to(pages.cache.dtype)
    write(given[0], given[1], pages.cache, torch.arange(n))
    found = pages.read(torch.arange(count), torch.arange(n))
    return all(
        torch.equal(x[0].transpose(0, 1), expected)
        for x, expected in zip(found, given, strict=True)
    )


def stream_compact(
    query: Tensor, pages: Pages, table: Tensor, segment: Segment, attention: Attention
) -> Tensor:
    """`query [n, H, D]`, the rows of a streaming segment -> `[n, H, D]`."""
    sink = attention.pattern.num_sink_tokens
    low = segment.keys - segment.rows
    first = low - attention.pattern.sliding_window_size + 1
    positions = torch.cat([torch.arange(sink), torch.arange(first, segment.keys)])
    key, value = pages.read(table, positions)
    start = low - (first - sink)
    beyond = start + segment.rows + attention.pattern.num_last_tokens  # no row here is a last one
    rows = Rows(start, (0,), (beyond,))
    output = block_attention(query.transpose(0, 1)[None], key, value, rows, attention)
    return output[0].transpose(0, 1)
