"""The control of block-sparse layers: as many blocks as the rule keeps, but any.

A check that cannot tell random blocks from the rule's says nothing about the rule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.pytorch.block_choice import BlockSparse, choose_blocks, forced_blocks
from trianglemix.pytorch.layout import Rows


class RandomBlocks:
    """A chooser for `choosing_blocks`: for each head and tile as many blocks as the rule keeps.

    The forced ones are among them. The same seed gives the same blocks, call by call.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, rows: Rows, attention: BlockSparse
    ) -> Tensor:
        """`block_mask` as `choose_blocks` returns it, bool `[B, H, C, C]`."""
        kept = choose_blocks(query, key, rows, attention)
        generator = torch.Generator(kept.device).manual_seed(1000 * self._seed + layer)
        return as_many(kept, attention.rule, generator)


def as_many(kept: Tensor, rule: BlockRule, generator: torch.Generator) -> Tensor:
    """Random causal blocks `[B, H, C, C]`: as many as `kept` of each tile, forced ones first."""
    block = torch.arange(kept.shape[3], device=kept.device)
    tile = block[:, None]
    order = torch.rand(kept.shape, generator=generator, device=kept.device)
    order = order.masked_fill(forced_blocks(tile, block, rule), 2).masked_fill(block > tile, -1)
    rank = order.argsort(-1, descending=True).argsort(-1)
    return rank < kept.sum(-1, keepdim=True)
