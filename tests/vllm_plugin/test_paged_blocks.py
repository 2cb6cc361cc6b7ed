"""What the kernels that read pages are handed: the same answer as from keys that are gathered."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.vllm import paged_blocks
from trianglemix.vllm.gathered_past import gather_past
from trianglemix.vllm.paged_blocks import PagedBlocks
from trianglemix.vllm.row_split import Request, split_rows
from trianglemix.vllm.segments import segment_tensors
from trianglemix.vllm.sparse_segments import attend_gathered, attend_sparse

from tests.vllm_plugin.flash_stand_in import SCALE, attend_pages, random_batch


@pytest.mark.parametrize("numbers", [(0.3, 0, 4, 1, 8), (0.7, 250, 130, 128, 128)])
def test_pages_and_gathered_keys_give_the_same(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[float, int, int, int, int]
) -> None:
    monkeypatch.setattr(paged_blocks, "attend_pages", attend_pages)
    rule = BlockRule(*numbers)
    requests = [Request(0, 300, 400, 620), Request(300, 700, 400, 400), Request(700, 956, 900, 990)]
    batch = random_batch(requests, rule, 0)
    segments = segment_tensors(split_rows(requests, rule).ours, batch.table)
    assert segments.count > 1
    attention = BlockSparse(rule, SCALE)
    gathered = partial(attend_gathered, partial(gather_past, batch.cache), attention)
    rows = segments.rows.take(batch.query)
    found = []
    for kernel in (PagedBlocks(batch.cache, attention), gathered):
        found.append(torch.full_like(rows, torch.nan))
        attend_sparse(rows, segments, kernel, found[-1])
    right = segments.rows.take(batch.expected)
    for output in found:
        torch.testing.assert_close(output, right.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("page", "size", "taken"),
    [
        (32, 128, True),
        (128, 64, True),
        (16, 128, False),
        (48, 128, False),
        (256, 128, False),
        (64, 80, False),
    ],
)
def test_other_sizes_are_gathered(page: int, size: int, taken: bool) -> None:
    cache = torch.empty(3, 2, page, 2 * size, dtype=torch.float16)
    assert PagedBlocks(cache, BlockSparse(BlockRule(), SCALE)).is_taken is taken
