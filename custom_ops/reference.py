"""The operator in float64 NumPy: obviously right, slow, and what every kernel is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.contract import AttentionShape, TrianglePattern
from trianglemix.custom_ops.pattern import BoolArray, keep

Array = NDArray[Any]


@dataclass(frozen=True)
class Call:
    """The inputs of one call, named and shaped as in `contract.INPUTS`.

    `past_key` and `past_value` are `[B, G, P, D]` and `[B, G, P, Dv]` (`P` may be 0);
    `seqlens_k`, `prompt_length` and `first_valid` are `[B]` int32.
    """

    query: Array
    key: Array
    value: Array
    past_key: Array
    past_value: Array
    seqlens_k: Array
    total_sequence_length: int
    prompt_length: Array | None = None
    first_valid: Array | None = None


@dataclass(frozen=True)
class Attention:
    """The attributes of the operator. `scale` 0 means `1/sqrt(D)`, `softcap` 0 means none."""

    shape: AttentionShape
    pattern: TrianglePattern
    scale: float = 0.0
    softcap: float = 0.0


def triangle_attention(call: Call, attention: Attention) -> tuple[Array, Array, Array]:
    """Returns `output [B, S, H*Dv]` in float64, and the present `[B, G, T, D]`, `[B, G, T, Dv]`.

    A row at or past its row's key end, and one that keeps no key, is zero. Slots that hold no
    key (`j < first_valid` or `j >= L`) never reach the output, whatever bits they hold.
    """
    batch, length = call.query.shape[:2]
    shape = attention.shape
    output = np.zeros((batch, length, shape.num_heads, shape.value_head_size))
    present_key, present_value = (
        _present(call, new, past, size)
        for new, past, size in (
            (call.key, call.past_key, shape.head_size),
            (call.value, call.past_value, shape.value_head_size),
        )
    )
    for b in range(batch):
        rows = call.query[b].reshape(length, shape.num_heads, shape.head_size)
        output[b] = _attend(
            rows, present_key[b], present_value[b], _row_mask(call, attention, b), attention
        )
    return output.reshape(batch, length, -1), present_key, present_value


def start_position(end: int, length: int) -> int:
    """Position of a row's first new token: `max(0, L - S)`, GroupQueryAttention's rule."""
    return max(0, end - length)


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


def _row_mask(call: Call, attention: Attention, b: int) -> BoolArray:
    """`[S, L]`: which of the keys before the row's end each new row keeps."""
    length = call.query.shape[1]
    end = int(call.seqlens_k[b]) + 1
    prompt_length = end if call.prompt_length is None else int(call.prompt_length[b])
    first_valid = 0 if call.first_valid is None else int(call.first_valid[b])
    rows = start_position(end, length) + np.arange(length)[:, None]
    kept = keep(rows, np.arange(end)[None, :], attention.pattern, prompt_length, first_valid)
    mask: BoolArray = kept & (rows < end)
    return mask


def _attend(
    rows: Array, keys: Array, values: Array, mask: BoolArray, attention: Attention
) -> Array:
    """`rows [S, H, D]`, `keys [G, T, D]`, `values [G, T, Dv]`, `mask [S, L]` -> `[S, H, Dv]`."""
    shape, end = attention.shape, mask.shape[1]
    group = shape.num_heads // shape.kv_num_heads
    # A dead slot may hold NaN, and 0 * NaN is NaN: only keys that a row keeps take part.
    exists = np.asarray(mask.any(axis=0))[:, None]
    result = np.zeros((rows.shape[0], shape.num_heads, shape.value_head_size))
    for h in range(shape.num_heads):
        k = np.where(exists, keys[h // group, :end].astype(np.float64), 0.0)
        v = np.where(exists, values[h // group, :end].astype(np.float64), 0.0)
        scores = rows[:, h].astype(np.float64) @ k.T * (attention.scale or shape.head_size**-0.5)
        if attention.softcap:
            scores = attention.softcap * np.tanh(scores / attention.softcap)
        result[:, h] = _masked_softmax(scores, mask) @ v
    return result


def _masked_softmax(scores: Array, mask: BoolArray) -> Array:
    """Softmax over the kept columns; a row that keeps none is all zeros."""
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, where=mask)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    weights = np.exp(np.where(mask, scores - peak, -np.inf))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0.0, 1.0, total)
