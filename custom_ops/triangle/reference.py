"""The operator in float64 NumPy: obviously right, slow, and what every kernel is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call, masked_attention, start_position
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep


@dataclass(frozen=True)
class Attention:
    """The attributes of the operator. `scale` 0 means `1/sqrt(D)`, `softcap` 0 means none."""

    shape: AttentionShape
    pattern: TrianglePattern
    scale: float = 0.0
    softcap: float = 0.0
    rotary_interleaved: bool = False


def triangle_attention(call: Call, attention: Attention) -> tuple[Array, Array, Array]:
    """Returns `output [B, S, H*Dv]` in float64, and the present `[B, G, T, D]`, `[B, G, T, Dv]`.

    A row at or past its row's key end, and one that keeps no key, is zero. Slots that hold no
    key (`j < first_valid` or `j >= L`) never reach the output, whatever bits they hold.
    """
    return masked_attention(call, attention, lambda b: _row_mask(call, attention, b))


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
