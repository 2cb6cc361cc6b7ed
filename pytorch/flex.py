"""The operators on CUDA: compiled flex_attention over block masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.block_choice import BlockSparse, TileSpan
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.masks import keep

TILE: Final = 128
"""Rows and keys of a block of the block mask."""


@dataclass(frozen=True)
class TileGrid:
    """Rows `[start, start + length)` against `keys` key slots."""

    rows: Rows
    length: int
    keys: int


def flex_triangle(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention
) -> Tensor:
    """`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`.

    Rows before their row's first real token are zero.
    """
    grid = TileGrid(rows, query.shape[2], key.shape[2])
    mask = triangle_block_mask(grid, attention.pattern, query.device)
    return _flex(query, key, value, mask, attention)


def flex_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    span: TileSpan,
    attention: BlockSparse,
) -> Tensor:
    """`block_sparse.SpanKernel`, which says the shapes: `[B, H, R, D]` -> `[B, H, R, Dv]`."""
    mask = kept_block_mask(kept, span, (query.shape[2], key.shape[2]))
    return _flex(query, key, value, mask, attention)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    attention: Attention | BlockSparse,
) -> Tensor:
    eager: Any = flex_attention
    run = _compiled() if query.is_cuda else eager
    result: Tensor = run(
        query,
        key,
        value,
        score_mod=_softcap(attention.softcap) if attention.softcap else None,
        block_mask=mask,
        scale=attention.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """Compiled for the first length, then once more for all lengths; lengths are tensors."""
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _softcap(cap: float) -> Callable[..., Tensor]:
    def apply(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return apply


@lru_cache(maxsize=4)
def triangle_block_mask(
    grid: TileGrid, pattern: TrianglePattern, device: torch.device
) -> BlockMask:
    """The block mask, without ever forming an `S x T` tensor: tiles are classed by their corners.

    All layers of one call share it, and so do calls with the same lengths.
    """
    start = torch.tensor(grid.rows.start, device=device)
    first = torch.tensor(grid.rows.first_valid, device=device)
    prompt = torch.tensor(grid.rows.prompt_length, device=device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keep(q + start, k, pattern, prompt[b], first[b])

    some, whole = _classify(grid, pattern, first, prompt)
    partial_count, partial_index = _listed((some & ~whole)[:, None])
    whole_count, whole_index = _listed(whole[:, None])
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        whole_count,
        whole_index,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(grid.length, grid.keys),
    )


def kept_block_mask(kept: Tensor, span: TileSpan, sizes: tuple[int, int]) -> BlockMask:
    """The block mask of each head's own blocks, `kept [B, H, tiles, blocks]`.

    Only the block on the diagonal is not whole, and every block of a tile that hangs over the end.
    """
    tiles = torch.arange(span.begin, span.end, device=kept.device)
    whole = kept & (torch.arange(kept.shape[3], device=kept.device) < tiles[:, None])
    if sizes[0] % TILE:
        whole[:, :, -1] = False
    begin = torch.tensor(span.begin, device=kept.device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return kept[b, h, q // TILE, k // TILE] & (k <= q + TILE * begin)

    partial_count, partial_index = _listed(kept & ~whole)
    whole_count, whole_index = _listed(whole)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        whole_count,
        whole_index,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=sizes,
    )


def _classify(
    grid: TileGrid, pattern: TrianglePattern, first: Tensor, prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """`[B, row tiles, key tiles]`: which tiles may keep a pair, and which keep all their pairs.

    With the last clause, rows of a tile keep more the further down they are, and the other clauses
    depend on `i - j` or on `j` alone, so that the corners of a tile tell.
    """
    device = first.device
    q0 = torch.arange(0, grid.length, TILE, device=device)[None, :, None] + grid.rows.start
    q1 = (q0 + TILE - 1).clamp(max=grid.rows.start + grid.length - 1)
    k0 = torch.arange(0, grid.keys, TILE, device=device)[None, None, :]
    k1 = (k0 + TILE - 1).clamp(max=grid.keys - 1)
    first, prompt = first[:, None, None], prompt[:, None, None]
    sink_end = first + pattern.num_sink_tokens
    last_row = prompt - pattern.num_last_tokens
    window = grid.length + grid.keys if pattern.is_dense else pattern.sliding_window_size
    some = (k0 <= q1) & (k1 >= first) & (q1 >= first)
    some &= (k0 < sink_end) & (first < sink_end) | (q0 - k1 < window) | (q1 >= last_row)
    whole = (k1 <= q0) & (k0 >= first)
    whole &= (k1 < sink_end) | (q1 - k0 < window) | (q0 >= last_row)
    # A tile that hangs over the end is never whole: its rows and keys beyond the end do not exist.
    whole &= (q0 + TILE <= grid.rows.start + grid.length) & (k0 + TILE <= grid.keys)
    return some, whole


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Count `[..., rows]` and indices `[..., rows, columns]` of the tiles that are set."""
    count = tiles.sum(-1, dtype=torch.int32)
    index = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return count, index.to(torch.int32)
