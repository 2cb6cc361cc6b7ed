"""The operator as one Triton kernel for Ascend, through triton-ascend.

A program takes a tile of query rows of one head. It visits the tiles of keys that hold sinks, then
those from the tile's first window on; a tile with a dense row visits every key tile before its end.
Softmax is kept online in float32, so that memory is O(rows of a tile). Cost: the visited tiles.
The query heads of a group read the same keys and values; nothing is repeated.

Imported only where triton is installed.
"""

from __future__ import annotations

from typing import Any, Final

import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

TILE: Final = (64, 128)
"""Rows and keys of a tile: with head size 128 in bfloat16 the largest that the buffers of 910B,
910_93 and 950 hold."""
EVERY_KEY: Final = 1 << 30
"""`window` of the dense mode: longer than any prompt, and half of what int32 holds."""
_jit: Any = triton.jit


@_jit  # type: ignore[untyped-decorator]
def _key_tiles(  # type: ignore[no-untyped-def]
    tile, start, rows, keys, valid, prompt, sink, window, last,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Key tiles of a row tile: first one with sinks, their number, first near one, their number."""
    low = start + tile * ROWS
    high = tl.minimum(start + tl.minimum((tile + 1) * ROWS, rows), keys)
    first = valid // KEYS
    near = tl.maximum(low - window + 1, valid) // KEYS
    near = tl.where(high > prompt - last, first, near)
    sink_end = tl.minimum((valid + sink + KEYS - 1) // KEYS, near)
    near_end = (high + KEYS - 1) // KEYS
    return first, tl.maximum(sink_end - first, 0), near, tl.maximum(near_end - near, 0)


@_jit
def _kept(position, column, valid, keys, prompt, sink, window, last):  # type: ignore[no-untyped-def]
    """The predicate of `pattern.keep` for the rows at `position` and the keys at `column`."""
    i, j = position[:, None], column[None, :]
    kept = (j - valid < sink) | (i - j < window) | (i >= prompt - last)
    return kept & (j <= i) & (j >= valid) & (j < keys)


@_jit  # type: ignore[untyped-decorator]
def triangle_attention_kernel(  # type: ignore[no-untyped-def]
    query,  # [B, H, S, D] by strides; the last axis is contiguous in all four tensors
    key,  # [B, G, T, D]
    value,  # [B, G, T, DV]
    output,  # [B, H, S, DV]
    first_valid,  # [B] int32
    prompt_length,  # [B] int32
    query_b, query_h, query_s,
    key_b, key_g, key_t,
    value_b, value_g, value_t,
    output_b, output_h, output_s,
    start,  # position of row 0
    rows,  # S
    keys,  # T: slots that hold a key, or a pad on the left
    heads_per_group,
    sink, window, last,
    scale, softcap,
    D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,  # the next powers of two
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // heads_per_group
    valid, prompt = tl.load(first_valid + batch), tl.load(prompt_length + batch)
    row = tile * ROWS + tl.arange(0, ROWS)
    feature, value_feature = tl.arange(0, WIDTH)[None, :], tl.arange(0, VALUE_WIDTH)[None, :]
    query += batch * query_b + head * query_h
    key += batch * key_b + group * key_g
    value += batch * value_b + group * value_g
    output += batch * output_b + head * output_h
    is_row = row[:, None] < rows
    q = tl.load(query + row[:, None] * query_s + feature, mask=is_row & (feature < D), other=0.0)
    first, sink_tiles, near, near_tiles = _key_tiles(
        tile, start, rows, keys, valid, prompt, sink, window, last, ROWS, KEYS
    )
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for step in range(0, sink_tiles + near_tiles):
        key_tile = tl.where(step < sink_tiles, first + step, near + step - sink_tiles)
        column = key_tile * KEYS + tl.arange(0, KEYS)
        slot, exists = column[:, None], ((column >= valid) & (column < keys))[:, None]
        k = tl.load(key + slot * key_t + feature, mask=exists & (feature < D), other=0.0)
        v = tl.load(
            value + slot * value_t + value_feature, mask=exists & (value_feature < DV), other=0.0
        )
        scores = tl.dot(q, tl.trans(k)) * scale
        if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        kept = _kept(start + row, column, valid, keys, prompt, sink, window, last)
        scores = tl.where(kept, scores, -1.0e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(kept, tl.exp(scores - new_peak[:, None]), 0.0)
        decay = tl.exp(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v)
        peak = new_peak
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    target = output + row[:, None] * output_s + value_feature
    tl.store(target, acc.to(q.dtype), mask=is_row & (value_feature < DV))


def power_of_two(size: int) -> int:
    """The next power of two, at least 16: what a tile's axis has."""
    return max(16, 1 << (size - 1).bit_length())
