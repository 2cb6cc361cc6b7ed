"""Run by test_triton.py in triton-ascend's environment: the kernel in its interpreter.

TRITON_INTERPRET=1 python -m pytest tests/custom_ops/ascend/triton_cases.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops import reference
from trianglemix.custom_ops.ascend.triton_kernel import TILE
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.npu_triton import triton_attention


@dataclass(frozen=True)
class Case:
    """New rows `start .. start + S - 1` of a batch of two."""

    shape: AttentionShape
    pattern: TrianglePattern
    start: int
    rows: int
    first_valid: tuple[int, int]
    beyond: tuple[int, int]  # tokens of the prompt after these rows
    softcap: float = 0.0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    start, rows = draw(st.integers(0, 60)), draw(st.integers(1, 40))
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    sizes = st.integers(1, 4).map(lambda n: 8 * n)
    end = start + rows
    return Case(
        AttentionShape(*heads, draw(sizes), draw(sizes)),
        TrianglePattern(
            draw(st.integers(0, 40)),
            draw(st.one_of(st.just(-1), st.integers(1, 50))),
            draw(st.integers(1, 30)),
        ),
        start,
        rows,
        (draw(st.integers(0, end - 1)), 0),
        (draw(st.integers(0, 40)), draw(st.integers(0, 40))),
        draw(st.sampled_from([0.0, 2.0])),
    )


@settings(max_examples=30, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_equals_the_reference(case: Case, seed: int) -> None:
    _check(case, seed, torch.float32, 3e-6, (16, 16))


DEPLOYED = Case(AttentionShape(2, 1, 64, 64), TrianglePattern(8, 60, 20), 150, 70, (0, 30), (0, 0))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float16, 2e-3)], ids=str
)
def test_tiles_as_they_are_deployed(dtype: torch.dtype, tolerance: float) -> None:
    _check(DEPLOYED, 0, dtype, tolerance, TILE)


def _check(
    case: Case, seed: int, dtype: torch.dtype, tolerance: float, tile: tuple[int, int]
) -> None:
    shape, end = case.shape, case.start + case.rows
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(2, heads, length, size, generator=generator).to(dtype)

    query = draw(shape.num_heads, case.rows, shape.head_size)
    key = draw(shape.kv_num_heads, end, shape.head_size)
    value = draw(shape.kv_num_heads, end, shape.value_head_size)
    for b, first in enumerate(case.first_valid):  # pads hold what they like
        key[b, :, :first] = value[b, :, :first] = float("nan")
    prompt = tuple(end + more for more in case.beyond)
    got = triton_attention(
        query, key, value,
        Rows(case.start, case.first_valid, prompt),
        Attention(case.pattern, shape.head_size**-0.5, case.softcap),
        tile,
    )  # fmt: skip
    want = _expected(case, (query, key, value), prompt)
    error = np.abs(got.numpy().astype(np.float64) - want)
    limit = tolerance * max(1e-3, float(np.abs(want).max()))
    bad = np.argwhere(~(error <= limit))
    assert not len(bad), f"{bad[0]}: {got[tuple(bad[0])]} instead of {want[tuple(bad[0])]}"


def _expected(case: Case, tensors: tuple[torch.Tensor, ...], prompt: tuple[int, ...]) -> np.ndarray:
    """The reference's output as `[B, H, S, Dv]`."""
    shape, end = case.shape, case.start + case.rows
    query, key, value = (x.numpy() for x in tensors)

    def flat(x: np.ndarray) -> np.ndarray:
        return x.transpose(0, 2, 1, 3).reshape(2, x.shape[2], -1)

    call = reference.Call(
        flat(query), flat(key[:, :, case.start :]), flat(value[:, :, case.start :]),
        key[:, :, : case.start], value[:, :, : case.start],
        seqlens_k=np.full(2, end - 1, np.int32),
        total_sequence_length=end,
        prompt_length=np.array(prompt, np.int32),
        first_valid=np.array(case.first_valid, np.int32),
    )  # fmt: skip
    attention = reference.Attention(shape, case.pattern, 0.0, case.softcap)
    output = reference.triangle_attention(call, attention)[0]
    return output.reshape(2, case.rows, shape.num_heads, -1).transpose(0, 2, 1, 3)
