"""Random attention calls as torch tensors, with the answer of the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops.contract import DENSE_WINDOW, AttentionShape
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention as ReferenceAttention
from trianglemix.custom_ops.triangle.reference import triangle_attention
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.layout import Rows

TOLERANCE = 3e-6


@dataclass(frozen=True)
class RandomCall:
    """`query [B, H, S, D]`, whole `key [B, G, T, D]` and `value`, the rows, the true answer."""

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Rows
    attention: Attention
    expected: Tensor

    def check(self, output: Tensor) -> None:
        """Compares `[B, H, S, Dv]` with the reference; says where and how much it is off."""
        scale = max(1.0, self.expected.abs().max().item())
        error = (output.double() - self.expected).abs() / scale
        worst = error.argmax().item()
        assert error.max().item() <= TOLERANCE, (
            f"flat index {worst}: {output.flatten()[int(worst)]} for "
            f"{self.expected.flatten()[int(worst)]}; {self.rows} {self.attention}"
        )


@st.composite
def calls(draw: st.DrawFn) -> RandomCall:
    """Any lengths, GQA ratios, head sizes, pads on the left, chunks, decode steps, softcap."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, group = (draw(st.integers(1, high)) for high in (3, 2, 3))
    D, Dv = 8 * draw(st.integers(1, 4)), 8 * draw(st.integers(1, 4))
    past = draw(st.one_of(st.just(0), st.integers(1, 300)))
    length = draw(st.one_of(st.just(1), st.integers(2, 300), st.integers(400, 700)))
    total = past + length
    ahead = draw(st.integers(0, 200))  # tokens of the prompt that come in later chunks
    first = [draw(st.integers(0, min(total - 1, 60))) for _ in range(batch)]
    pattern = TrianglePattern(
        draw(st.integers(0, 20)),
        draw(st.one_of(st.just(DENSE_WINDOW), st.integers(1, 40), st.integers(1, 200))),
        draw(st.integers(1, 150)),
    )
    softcap = draw(st.sampled_from([0.0, 0.0, 5.0]))
    shape = AttentionShape(kv_heads * group, kv_heads, D, Dv)

    def normal(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes).astype(np.float32)

    q = normal(batch, shape.num_heads, length, D)
    k, v = normal(batch, kv_heads, total, D), normal(batch, kv_heads, total, Dv)
    call = Call(
        query=_packed(q),
        key=_packed(k[:, :, past:]),
        value=_packed(v[:, :, past:]),
        past_key=k[:, :, :past],
        past_value=v[:, :, :past],
        seqlens_k=np.full(batch, total - 1),
        total_sequence_length=total,
        prompt_length=np.full(batch, total + ahead),
        first_valid=np.array(first),
    )
    scale = draw(st.sampled_from([D**-0.5, 0.3]))
    answer, _, _ = triangle_attention(call, ReferenceAttention(shape, pattern, scale, softcap))
    expected = answer.reshape(batch, length, shape.num_heads, Dv).transpose(0, 2, 1, 3)
    return RandomCall(
        torch.from_numpy(q),
        torch.from_numpy(k),
        torch.from_numpy(v),
        Rows(past, tuple(first), (total + ahead,) * batch),
        Attention(pattern, scale, softcap),
        torch.from_numpy(expected.copy()),
    )


def _packed(x: np.ndarray) -> np.ndarray:
    """`[B, H, S, D]` -> `[B, S, H*D]`."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)
