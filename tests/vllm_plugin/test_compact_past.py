"""Streaming rows out of pages, against attention under the predicate's mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep_mask
from trianglemix.pytorch.blocks import Attention
from trianglemix.vllm.compact_past import Pages, read_back, stream_compact
from trianglemix.vllm.row_split import Request, split_rows

H, G, D, PAGE = 4, 2, 8, 16


def _write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """As vLLM's kernel does: a page of a head holds its keys transposed, then its values."""
    pages = cache.shape[0]
    halves = cache.view(pages, G, 2, PAGE * D)
    for n, slot in enumerate(slots.tolist()):
        page, place = divmod(slot, PAGE)
        halves[page, :, 0].view(G, D, PAGE)[:, :, place] = key[n]
        halves[page, :, 1].view(G, PAGE, D)[:, place] = value[n]


def _reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[N, H, D]`, `[N, G, D]` -> `[N, H, D]` in float64."""
    key, value = (x.double().repeat_interleave(H // G, 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query.double(), key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 130), st.data(), st.integers(0, 5), st.integers(1, 30), st.integers(1, 20),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_chunk_sees_what_the_predicate_keeps(
    length: int, data: st.DataObject, sink: int, window: int, last: int, seed: int
) -> None:
    torch.manual_seed(seed)
    pattern = TrianglePattern(sink, window, last)
    tokens = data.draw(st.integers(1, length))
    rows = data.draw(st.integers(1, tokens))
    count = -(-length // PAGE) + 2
    table = torch.randperm(count, dtype=torch.int32)
    cache = torch.full((count, G, PAGE, 2 * D), float("nan"))
    query = torch.randn(length, H, D)
    key, value = torch.randn(2, length, G, D)
    position = torch.arange(tokens)
    _write(key[:tokens], value[:tokens], cache, table[position // PAGE] * PAGE + position % PAGE)
    expected = _reference(query, key, value, torch.from_numpy(keep_mask(length, pattern)), D**-0.5)
    split = split_rows([Request(0, rows, tokens, length)], pattern)
    for segment in split.ours:
        low = segment.keys - segment.rows
        found = stream_compact(
            query[low : segment.keys], Pages(cache, D), table, segment, Attention(pattern, D**-0.5)
        )
        torch.testing.assert_close(found.double(), expected[low : segment.keys], rtol=0, atol=2e-6)


def test_another_layout_of_pages_is_noticed() -> None:
    pages = Pages(torch.zeros(3, G, PAGE, 2 * D), D)
    assert read_back(_write, pages)

    def untransposed(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        flat = cache.transpose(1, 2).reshape(-1, G, 2 * D)
        flat[slots] = torch.cat([key, value], -1)
        cache.copy_(flat.view(3, PAGE, G, 2 * D).transpose(1, 2))

    assert not read_back(untransposed, pages)
