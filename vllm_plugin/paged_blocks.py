"""Rows of sparse tiles by our kernels on vLLM's pages, where they lie: nothing is gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.pytorch.cuda_backend import HOPPER_HEAD_SIZES, device_lengths
from trianglemix.pytorch.paged_call import KeyPages, PagedInputs, attend_pages
from trianglemix.vllm.row_split import Segment
from trianglemix.vllm.sparse_segments import rows_of

PAGE_SIZES: Final = (32, 64, 128)
"""Those that are read in place: pages of 16 take longer so than gathered (docs/experiments.md)."""


def reads_pages(page: int, head_size: int) -> bool:
    """Whether the kernels take heads of this size, on a Hopper GPU, and pages are worth it."""
    return page in PAGE_SIZES and head_size in HOPPER_HEAD_SIZES


@dataclass(frozen=True)
class PagedBlocks:
    """A `SegmentKernel` on a layer's pages, `kv_cache [pages, G, page, 2 D]`."""

    kv_cache: Tensor
    attention: BlockSparse

    @property
    def is_taken(self) -> bool:
        """Whether these pages are read in place."""
        _, _, page, both = self.kv_cache.shape
        return reads_pages(page, both // 2)

    def __call__(self, query: Tensor, table: Tensor, segment: Segment, output: Tensor) -> None:
        """See `SegmentKernel`."""
        D, rule = query.shape[2], self.attention.rule
        end, prompt, _ = device_lengths(rows_of(segment), segment.rows, query.device)
        pages = KeyPages(self.kv_cache[..., :D], self.kv_cache[..., D:], table)
        numbers = {
            "sink": rule.num_sink_tokens,
            "window": rule.sliding_window_size,
            "last": rule.num_last_tokens,
            "scale": self.attention.scale,
            "softcap": self.attention.softcap,
            "mass": rule.mass,
            "min_length": rule.min_length,
        }
        rows = query[None].transpose(1, 2)
        attend_pages(PagedInputs(rows, pages, end, prompt, segment.keys), numbers, output[None])
