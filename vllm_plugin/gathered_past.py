"""A request's keys and values out of FlashAttention's pages, for kernels without page tables."""

from __future__ import annotations

from torch import Tensor


def gather_past(kv_cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, G, T, D]` of the first `T = tokens` tokens of a request.

    `kv_cache [pages, G, page, 2 D]` has a head's keys before its values, `table [pages]` int32 the
    request's pages in order. Each of the two is a view of whole pages, contiguous but for the slots
    after `T`, and takes `2 T G D` numbers together until the call that reads it is done.
    """
    _, G, page, both = kv_cache.shape
    D = both // 2
    wanted = table[: -(-tokens // page)]
    key, value = (
        half.transpose(0, 1).index_select(1, wanted).view(1, G, -1, D)[:, :, :tokens]
        for half in (kv_cache[..., :D], kv_cache[..., D:])
    )
    return key, value
