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
    valid = tl.load(first_valid + batch)
    prompt = tl.load(prompt_length + batch)
    row = tile * ROWS + tl.arange(0, ROWS)
    position = start + row
    feature, value_feature = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q = tl.load(
        query + batch * query_b + head * query_h + row[:, None] * query_s + feature[None, :],
        mask=(row[:, None] < rows) & (feature[None, :] < D),
        other=0.0,
    )
    # Which key tiles: the first position of the tile, and one past the last.
    low = start + tile * ROWS
    high = tl.minimum(start + tl.minimum((tile + 1) * ROWS, rows), keys)
    first_tile = valid // KEYS
    near = tl.maximum(low - window + 1, valid) // KEYS
    near = tl.where(high > prompt - last, first_tile, near)
    sink_end = tl.minimum((valid + sink + KEYS - 1) // KEYS, near)
    sink_tiles = tl.maximum(sink_end - first_tile, 0)
    near_tiles = tl.maximum((high + KEYS - 1) // KEYS - near, 0)
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for step in range(0, sink_tiles + near_tiles):
        key_tile = tl.where(step < sink_tiles, first_tile + step, near + step - sink_tiles)
        column = key_tile * KEYS + tl.arange(0, KEYS)
        exists = (column >= valid) & (column < keys)
        k = tl.load(
            key + batch * key_b + group * key_g + column[:, None] * key_t + feature[None, :],
            mask=exists[:, None] & (feature[None, :] < D),
            other=0.0,
        )
        v = tl.load(
            value + batch * value_b + group * value_g + column[:, None] * value_t
            + value_feature[None, :],
            mask=exists[:, None] & (value_feature[None, :] < DV),
            other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k)) * scale
        if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        i, j = position[:, None], column[None, :]
        kept = (j - valid < sink) | (i - j < window) | (i >= prompt - last)
        kept = kept & (j <= i) & (j >= valid) & (j < keys)
        scores = tl.where(kept, scores, -1.0e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(kept, tl.exp(scores - new_peak[:, None]), 0.0)
        decay = tl.exp(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v)
        peak = new_peak
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        output + batch * output_b + head * output_h + row[:, None] * output_s
        + value_feature[None, :],
        acc.to(q.dtype),
        mask=(row[:, None] < rows) & (value_feature[None, :] < DV),
    )  # fmt: skip


def power_of_two(size: int) -> int:
    """The next power of two, at least 16: what a tile's axis has."""
    return max(16, 1 << (size - 1).bit_length())
