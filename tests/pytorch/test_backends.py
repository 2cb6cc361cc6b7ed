"""Every backend equals the float64 reference, on random shapes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch import flex
from trianglemix.pytorch.backends import triangle_attention
from trianglemix.pytorch.blocks import BLOCK, Attention, block_attention
from trianglemix.pytorch.flex import TileGrid, flex_triangle, triangle_block_mask
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.masks import keep
from trianglemix.pytorch.npu import npu_attention

from tests.pytorch.reference_call import RandomCall, calls


def _run(backend: Any, call: RandomCall) -> Tensor:
    result: Tensor = backend(call.query, call.key, call.value, call.rows, call.attention)
    return result


@given(calls())
@settings(max_examples=25, deadline=None)
def test_blocks_equal_the_reference(call: RandomCall) -> None:
    call.check(_run(block_attention, call))


@given(calls())
@settings(max_examples=20, deadline=None)
def test_the_dispatcher_equals_the_reference(call: RandomCall) -> None:
    call.check(_run(triangle_attention, call))


@given(calls())
@settings(max_examples=10, deadline=None)
def test_flex_equals_the_reference(call: RandomCall) -> None:
    call.check(_run(flex_triangle, call))


@given(calls())
@settings(max_examples=10, deadline=None)
def test_npu_blocks_equal_the_reference(call: RandomCall) -> None:
    fake = types.ModuleType("torch_npu")
    fake.npu_fusion_attention = _fusion_attention  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_npu", fake)
        call.check(_run(npu_attention, call))


def _fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Tensor]:
    """What Ascend's documentation says of the fused call: True in the mask means dropped."""
    assert (input_layout, sparse_mode, query.shape[1]) == ("BNSD", 0, head_num)
    kept = None if atten_mask is None else ~atten_mask
    return (scaled_dot_product_attention(query, key, value, attn_mask=kept, scale=scale),)


@given(calls())
@settings(max_examples=15, deadline=None)
def test_the_block_mask_is_the_one_of_the_predicate(call: RandomCall) -> None:
    """Every tile that keeps a pair is visited; a tile called whole keeps all its pairs."""
    rows, pattern = call.rows, call.attention.pattern
    S, T = call.query.shape[2], call.key.shape[2]
    first, prompt = torch.tensor(rows.first_valid), torch.tensor(rows.prompt_length)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keep(q + rows.start, k, pattern, prompt[b], first[b])

    tile = 16  # small ones, so that random windows hold whole tiles
    truth = create_block_mask(mask_mod, len(first), None, S, T, device="cpu", BLOCK_SIZE=tile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "TILE", tile)
        make = triangle_block_mask.__wrapped__
        ours = make(TileGrid(rows, S, T), pattern, torch.device("cpu"))
    partial, whole = (_tiles(ours.kv_num_blocks, ours.kv_indices), _whole_tiles(ours))
    true_partial = _tiles(truth.kv_num_blocks, truth.kv_indices)
    true_whole = _whole_tiles(truth)
    assert not bool((partial & whole).any())
    assert bool((whole <= true_whole).all()), "a tile called whole drops a pair"
    assert bool(((partial | whole) >= (true_partial | true_whole)).all()), "a tile is missing"
    assert int((partial | whole).sum()) <= int((true_partial | true_whole).sum()) * 1.25 + 4


def _whole_tiles(mask: BlockMask) -> Tensor:
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return _tiles(mask.full_kv_num_blocks, mask.full_kv_indices)


def _tiles(count: Tensor, index: Tensor) -> Tensor:
    """`[B, 1, rows, columns]`: True for the tiles that the first `count` indices name."""
    named = torch.arange(index.shape[-1]) < count[..., None]
    return (
        torch.zeros(index.shape, dtype=torch.int32).scatter_add_(
            -1, index.long(), named.to(torch.int32)
        )
        > 0
    )


def test_memory_does_not_grow_with_the_square_of_the_prompt() -> None:
    """The largest tensor of a 20,000 token prompt is far below its 4e8 pairs."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    N, pattern = 20_000, TrianglePattern(8, 64, 16)
    q = torch.randn(1, 2, N, 8)
    with Watch():
        block_attention(q, q[:, :1], q[:, :1], Rows(0, (0,), (N,)), Attention(pattern, 0.3))
    assert largest <= 2 * BLOCK * N


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("length", [512, 1000, 4096])
def test_compiled_flex_equals_the_blocks_on_cuda(length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    q = torch.randn(2, 8, length, 64, device="cuda", generator=generator)
    k = torch.randn(2, 2, length, 64, device="cuda", generator=generator)
    rows = Rows(0, (0, 37), (length, length))
    attention = Attention(TrianglePattern(8, 128, 64), 0.125)
    expected = block_attention(q, k, k, rows, attention)
    torch.testing.assert_close(flex_triangle(q, k, k, rows, attention), expected, atol=2e-3, rtol=0)
