"""Keys and values laid out by pages, as engines that serve lay them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from trianglemix.pytorch.paged_call import KeyPages

SPARE: Final = 3
"""Pages of the pool that no row has."""


def beside(pages: int, heads: int, size: int, width: int) -> tuple[int, ...]:
    """vLLM's: a head's keys, and a key's value behind it, `[pages, G, size, 2 D]`."""
    del pages
    return (heads * size * width, size * width, width)


def by_token(pages: int, heads: int, size: int, width: int) -> tuple[int, ...]:
    """A token's heads lie together, `[pages, size, G, 2 D]`."""
    del pages
    return (size * heads * width, width, heads * width)


Strides = Callable[[int, int, int, int], tuple[int, ...]]
LAYOUTS: Final[tuple[Strides, ...]] = (beside, by_token)


def paged(
    key: Tensor,
    value: Tensor,
    ends: list[int],
    size: int,
    *,
    strides: Strides = beside,
    apart: bool = False,
    seed: int = 0,
) -> KeyPages:
    """`key [B, G, T, D]` and `value` by pages of `size` slots, dealt out in random order.

    Whatever is no key of a row (its `ends`) is NaN, and the table's entries behind its last page
    name no page at all. Values are in a pool of their own where they are `apart`.
    """
    B, G, T, D = key.shape
    width = D + value.shape[3]
    row_pages = -(-T // size)
    count = B * row_pages + SPARE
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=random)
    storage = torch.full((count * G * size * width,), torch.nan, dtype=key.dtype)
    pool = storage.as_strided((count, G, size, width), (*strides(count, G, size, width), 1))
    table = torch.full((B, row_pages + 5), 2**31 - 1, dtype=torch.int32)
    for b, end in enumerate(ends):
        for n in range(-(-end // size)):
            page, slots = int(order[b * row_pages + n]), slice(n * size, min(end, (n + 1) * size))
            table[b, n] = page
            used = slots.stop - slots.start
            pool[page, :, :used, :D] = key[b, :, slots].cpu()
            pool[page, :, :used, D:] = value[b, :, slots].cpu()
    on_device = storage.to(key.device).as_strided(pool.shape, pool.stride())
    values = on_device[..., D:]
    return KeyPages(
        on_device[..., :D], values.contiguous() if apart else values, table.to(key.device)[:, :-3]
    )
