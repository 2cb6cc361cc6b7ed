"""Masks of whole prompts, the NPU form of a mask, and the card's attention module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.pattern import keep_mask
from trianglemix.pytorch import (
    AscendNPUTriangleMixOptimizer,
    AscendTriangleMixAttention,
    TriangleMixConfig,
    TriangleMixMaskGenerator,
)

CONFIG = TriangleMixConfig(4, 16, 8, num_triangle_layers=2)


@given(st.integers(1, 90), st.integers(0, 9), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_sections_are_disjoint_and_make_the_triangle(
    length: int, sink: int, window: int, last: int
) -> None:
    make = TriangleMixMaskGenerator(TriangleMixConfig(sink, window, last))
    streaming = make.get_streaming_mask(length)
    last_part, middle = make.get_last_mask(length), make.get_middle_mask(length)
    triangle = torch.from_numpy(keep_mask(length, make.config.pattern))
    assert torch.equal(make.get_triangle_mask(length), triangle)
    assert torch.equal(streaming | last_part, triangle)
    assert torch.equal(triangle | middle, make.get_dense_mask(length))
    assert not bool((streaming & last_part).any())
    assert not bool((triangle & middle).any())
    i, j = np.ogrid[:length, :length]
    expected = (j <= i) & ((j < sink) | (i - j < window))
    np.testing.assert_array_equal(streaming.numpy(), expected)


def test_the_additive_mask_follows_the_layers() -> None:
    make = TriangleMixMaskGenerator(CONFIG, num_layers=6)
    dense = make.get_attention_mask(64, 3, "cpu", torch.float16)
    triangle = make.get_attention_mask(64, 4, "cpu", torch.float16)
    kept = torch.from_numpy(keep_mask(64, CONFIG.pattern))
    assert torch.equal(triangle == 0, kept)
    assert triangle.dtype == torch.float16
    assert bool(torch.isneginf(triangle[~kept]).all())
    assert torch.equal(dense == 0, torch.ones(64, 64).tril().bool())
    overruled = make.get_attention_mask(64, 0, "cpu", torch.float16, use_triangle=True)
    assert torch.equal(overruled, triangle)


def test_layers_counted_from_the_deepest_need_the_count() -> None:
    with pytest.raises(ConfigurationError, match="num_layers"):
        TriangleMixMaskGenerator(CONFIG).should_use_triangle(3)
    with pytest.raises(ConfigurationError, match="40000"):
        TriangleMixMaskGenerator(CONFIG, 6).get_triangle_mask(40000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_npu_mask_is_finite_and_in_whole_blocks(dtype: torch.dtype) -> None:
    mask = TriangleMixMaskGenerator(CONFIG, 6).get_attention_mask(100, 5, "cpu", dtype)
    result = AscendNPUTriangleMixOptimizer().optimize_mask_for_npu(mask)
    assert result.shape == (128, 128)
    assert result.dtype == dtype
    assert bool(torch.isfinite(result).all())
    assert bool(torch.isfinite(result + result).all())
    assert torch.equal(result[:100, :100] == 0, mask == 0)
    assert bool((result[100:] < 0).all())
    assert bool((result[:, 100:] < 0).all())
    scores = torch.randn(100, 100).to(dtype)
    expected = torch.softmax((scores + mask).float(), -1)
    got = torch.softmax((scores + result[:100, :100]).float(), -1)
    torch.testing.assert_close(got, expected)


def test_a_bool_mask_is_taken_and_a_bad_block_is_refused() -> None:
    optimizer = AscendNPUTriangleMixOptimizer()
    kept = TriangleMixMaskGenerator(CONFIG, 6).get_triangle_mask(64)
    assert torch.equal(optimizer.optimize_mask_for_npu(kept) == 0, kept)
    with pytest.raises(ConfigurationError, match="256"):
        optimizer.optimize_mask_for_npu(kept, block_size=256)
    with pytest.raises(ConfigurationError, match="int64"):
        optimizer.optimize_mask_for_npu(kept.long())


@pytest.mark.parametrize("layer", [0, 5])
def test_the_attention_module_applies_the_mask_of_its_layer(layer: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 300, heads, 16, generator=generator) for heads in (4, 2, 2))
    module = AscendTriangleMixAttention(4, 16, 0.25, CONFIG, layer_idx=layer, num_layers=6)
    mask = TriangleMixMaskGenerator(CONFIG, 6).get_attention_mask(300, layer, "cpu", torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 0.25 + mask
    weights = torch.softmax(scores, -1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(module(q, k, v), expected, atol=3e-6, rtol=1e-5)


def test_the_attention_module_names_what_does_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="layer_idx"):
        AscendTriangleMixAttention(4, 16, None, CONFIG)
    module = AscendTriangleMixAttention(4, 16)
    x = torch.randn(1, 8, 5, 16)
    with pytest.raises(ConfigurationError, match="5"):
        module(x, x, x)
