"""What block-sparse layers keep inside vLLM: counted beside the layers' own calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import TILE
from trianglemix.pytorch.block_choice import BlockSparse, choose_blocks
from trianglemix.pytorch.cuda_backend import device_lengths
from trianglemix.pytorch.cuda_call import Inputs, run_kernels
from trianglemix.pytorch.layout import Rows
from trianglemix.vllm.backend import TriangleForward


@dataclass
class Kept:
    """Pairs of a tile and a block of sparse tiles, all heads and layers: kept, and all of them."""

    kept: int = 0
    pairs: int = 0

    def density(self, heads: int, layers: int, tokens: int) -> float:
        """Of all causal pairs of a prompt read once by so many layers; those of dense tiles too."""
        tiles = -(-tokens // TILE)
        every = heads * layers * tiles * (tiles + 1) // 2
        return 1 - (self.pairs - self.kept) / every


@contextmanager
def counting_blocks() -> Iterator[Kept]:
    """Chooses the blocks of every call of a block-sparse layer once more, and counts them."""
    found, attend = Kept(), TriangleForward.attend_blocks

    def counted(self: Any, query: Tensor, kv_cache: Tensor, step: Any, output: Tensor) -> None:
        begin, segments = 0, step.ours
        attention = BlockSparse(step.keeps, self.scale)
        for segment, table in zip(segments.segments, segments.table, strict=True):
            rows = query[None, begin : begin + segment.rows].transpose(1, 2)
            begin += segment.rows
            keys = [x.contiguous() for x in self.gather(kv_cache, table, segment.keys)]
            place = Rows(segment.keys - segment.rows, (0,), (segment.prompt_length,))
            mask = _chosen(rows, keys, place, attention)
            first = place.start // TILE
            found.kept += int(mask[:, :, first:].sum(dtype=torch.int64))
            tiles = range(first + 1, mask.shape[2] + 1)
            found.pairs += mask.shape[1] * sum(tiles)
        attend(self, query, kv_cache, step, output)

    TriangleForward.attend_blocks = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        TriangleForward.attend_blocks = attend  # type: ignore[method-assign]


def _chosen(query: Tensor, keys: list[Tensor], rows: Rows, attention: BlockSparse) -> Tensor:
    """`[1, H, C, C]`: the blocks that the layer's own code chooses on this device."""
    key, value = keys
    if query.device.type == "cpu":
        return choose_blocks(query, key, rows, attention)
    H, T, rule = query.shape[1], key.shape[2], attention.rule
    size = -(-T // TILE)
    mask = torch.zeros(1, H, size, size, dtype=torch.uint8, device=query.device)
    numbers = {
        "sink": rule.num_sink_tokens, "window": rule.sliding_window_size,
        "last": rule.num_last_tokens, "scale": attention.scale, "softcap": attention.softcap,
        "mass": rule.mass, "min_length": rule.min_length,
    }  # fmt: skip
    lengths = device_lengths(rows, query.shape[2], query.device)
    run_kernels("block_sparse", Inputs(query, key, value, *lengths), numbers, mask)
    return mask
