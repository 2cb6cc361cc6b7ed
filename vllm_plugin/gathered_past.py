"""A request's keys and values out of FlashAttention's pages, for kernels without page tables."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_past(kv_cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, G, T, D]` of the first `T = tokens` tokens of a request.

    `kv_cache [pages, G, page, 2 D]` has a head's keys before its values, `table [pages]` int32 the
    request's pages in order. Each of the two is the beginning of a buffer `[1, G, slots, D]`, whose
    slots are a power of two: as a prompt grows chunk by chunk, the allocator gives the same few
    again.
    """
    _, G, page, both = kv_cache.shape
    D, pages = both // 2, -(-tokens // page)
    buffers = kv_cache.new_empty(2, G, 1 << (pages - 1).bit_length(), page, D)
    for half, buffer in zip((kv_cache[..., :D], kv_cache[..., D:]), buffers, strict=True):
        torch.index_select(half.transpose(0, 1), 1, table[:pages], out=buffer[:, :pages])
    key, value = (buffer.view(1, G, -1, D)[:, :, :tokens] for buffer in buffers)
    return key, value
