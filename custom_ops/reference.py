"""Attention with a cache in float64 NumPy: obviously right, slow. Each operator brings its mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.contract import AttentionShape


@dataclass(frozen=True)
class Call:
    """The inputs of one call, named and shaped as in `contract.INPUTS` and `ROTARY_INPUTS`.

    `past_key` and `past_value` are `[B, G, P, D]` and `[B, G, P, Dv]` (`P` may be 0);
    `seqlens_k`, `prompt_length` and `first_valid` are `[B]` int32. `key` and `value` are None
    where `query` holds all three, `[B, S, (H+2G)*D]`.
    """

    query: Array
    key: Array | None
    value: Array | None
    past_key: Array
    past_value: Array
    seqlens_k: Array
    total_sequence_length: int
    prompt_length: Array | None = None
    first_valid: Array | None = None
    cos_cache: Array | None = None
    sin_cache: Array | None = None


class Heads(Protocol):
    """What the attributes of every operator say. `scale` 0 means `1/sqrt(D)`, `softcap` 0 none."""

    @property
    def shape(self) -> AttentionShape: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float: ...
    @property
    def rotary_interleaved(self) -> bool: ...


def masked_attention(
    call: Call, heads: Heads, row_mask: Callable[[int], BoolArray]
) -> tuple[Array, Array, Array]:
    """Returns `output [B, S, H*Dv]` in float64, and the present `[B, G, T, D]`, `[B, G, T, Dv]`.

    `row_mask(b)` is `[S, L]`, or `[H, S, L]`: which keys before its end each new row of batch row
    `b` keeps. A row that keeps no key is zero. Slots that no row keeps never reach the output,
    whatever they hold.
    """
    batch, length = call.query.shape[:2]
    rows, present_key, present_value = rows_and_present(call, heads)
    output = np.zeros((batch, length, heads.shape.num_heads, heads.shape.value_head_size))
    for b in range(batch):
        output[b] = _attend(rows[b], present_key[b], present_value[b], row_mask(b), heads)
    return output.reshape(batch, length, -1), present_key, present_value


def rows_and_present(call: Call, heads: Heads) -> tuple[Array, Array, Array]:
    """Queries `[B, S, H, D]` and the present `[B, G, T, D]`, `[B, G, T, Dv]`, as stored."""
    shape = heads.shape
    query, key, value = _turned_tokens(call, heads)
    return (
        query.reshape(*query.shape[:2], shape.num_heads, shape.head_size),
        _present(call, key, call.past_key, shape.head_size),
        _present(call, value, call.past_value, shape.value_head_size),
    )


def probabilities(rows: Array, keys: Array, mask: BoolArray, heads: Heads) -> Array:
    """`[R, L]` of one head's `rows [R, D]` over the `keys [L, D]` that `mask [R, L]` keeps."""
    # A dead slot may hold NaN, and 0 * NaN is NaN: only keys that a row keeps take part.
    exists = np.asarray(mask.any(axis=0))[:, None]
    k = np.where(exists, keys.astype(np.float64), 0.0)
    scores = rows.astype(np.float64) @ k.T * (heads.scale or heads.shape.head_size**-0.5)
    if heads.softcap:
        scores = heads.softcap * np.tanh(scores / heads.softcap)
    return _masked_softmax(scores, mask)


def start_position(end: int, length: int) -> int:
    """Position of a row's first new token: `max(0, L - S)`, GroupQueryAttention's rule."""
    return max(0, end - length)


def rotate(rows: Array, angles: tuple[Array, Array], positions: Array, interleaved: bool) -> Array:
    """`rows [B, S, heads, D]` turned at `positions [B, S]`; `angles` are cosines and sines.

    Computed in float64 and rounded once to the rows' type. Positions past the last are the last.
    """
    cosine, sine = (table.astype(np.float64) for table in angles)  # [M, R/2]
    half = cosine.shape[1]
    at = np.minimum(positions, len(cosine) - 1)
    cosine, sine = cosine[at][:, :, None], sine[at][:, :, None]  # [B, S, 1, R/2]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    x, y = rows[..., first].astype(np.float64), rows[..., second].astype(np.float64)
    turned = rows.copy()
    turned[..., first] = (x * cosine - y * sine).astype(rows.dtype)
    turned[..., second] = (y * cosine + x * sine).astype(rows.dtype)
    return turned


def _turned_tokens(call: Call, heads: Heads) -> tuple[Array, Array, Array]:
    """New queries, keys and values `[B, S, heads*D]`: unpacked, and turned by their positions."""
    shape, (batch, length) = heads.shape, call.query.shape[:2]
    key, value, query = call.key, call.value, call.query
    if key is None or value is None:
        widths = shape.num_heads * shape.head_size, shape.kv_num_heads * shape.head_size
        query, key, value = np.split(query, [widths[0], widths[0] + widths[1]], axis=-1)
    if call.cos_cache is None or call.sin_cache is None:
        return query, key, value
    ends = call.seqlens_k.astype(np.int64) + 1
    starts = np.array([start_position(int(end), length) for end in ends])
    positions = starts[:, None] + np.arange(length)
    angles = call.cos_cache, call.sin_cache
    query, key = (
        rotate(
            x.reshape(batch, length, -1, shape.head_size),
            angles,
            positions,
            heads.rotary_interleaved,
        ).reshape(x.shape)
        for x in (query, key)
    )
    return query, key, value


def _present(call: Call, new: Array, past: Array, size: int) -> Array:
    batch, length = new.shape[:2]
    kv_heads, capacity = past.shape[1], past.shape[2]
    slots = max(capacity, call.total_sequence_length)
    present = np.zeros((batch, kv_heads, slots, size), new.dtype)
    present[:, :, :capacity] = past
    for b in range(batch):
        end = int(call.seqlens_k[b]) + 1
        start = start_position(end, length)
        tokens = new[b].reshape(length, kv_heads, size).transpose(1, 0, 2)
        present[b, :, start : start + length] = tokens[:, : slots - start]
    return present


def _attend(rows: Array, keys: Array, values: Array, mask: BoolArray, heads: Heads) -> Array:
    """`rows [S, H, D]`, `keys [G, T, D]`, `values [G, T, Dv]`, `mask [S, L]` -> `[S, H, Dv]`."""
    shape, end = heads.shape, mask.shape[-1]
    group = shape.num_heads // shape.kv_num_heads
    masks = np.broadcast_to(mask, (shape.num_heads, *mask.shape[-2:]))
    result = np.zeros((rows.shape[0], shape.num_heads, shape.value_head_size))
    for h, kept in enumerate(masks):
        exists = np.asarray(kept.any(axis=0))[:, None]
        v = np.where(exists, values[h // group, :end].astype(np.float64), 0.0)
        result[:, h] = probabilities(rows[:, h], keys[h // group, :end], kept, heads) @ v
    return result


def _masked_softmax(scores: Array, mask: BoolArray) -> Array:
    """Softmax over the kept columns; a row that keeps none is all zeros."""
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, where=mask)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    weights = np.exp(np.where(mask, scores - peak, -np.inf))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0.0, 1.0, total)
