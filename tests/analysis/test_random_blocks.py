"""The control keeps as many blocks as the rule, the forced ones among them, and others."""

from __future__ import annotations

import torch
from trianglemix.analysis.random_blocks import RandomBlocks
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.pytorch.block_choice import BlockSparse, choose_blocks, forced_blocks
from trianglemix.pytorch.layout import Rows

RULE = BlockRule(mass=0.5, min_length=0, num_sink_tokens=8)


def test_as_many_blocks_for_each_head_and_tile() -> None:
    random = torch.Generator().manual_seed(3)
    q = 2 * torch.randn(2, 4, 1700, 16, generator=random)
    k = 2 * torch.randn(2, 2, 1700, 16, generator=random)
    given = q, k, Rows(0, (0, 90), (1700, 1700)), BlockSparse(RULE, 0.4)
    kept, control = choose_blocks(*given), RandomBlocks(1)(5, *given)
    assert torch.equal(kept.sum(-1), control.sum(-1))
    assert not torch.equal(kept, control)
    block = torch.arange(kept.shape[3])
    assert not (control & (block > block[:, None])).any()
    forced = forced_blocks(block[:, None], block, RULE) & (block <= block[:, None])
    assert bool((control | ~forced)[0].all())
    assert torch.equal(RandomBlocks(1)(5, *given), control)
    assert not torch.equal(RandomBlocks(1)(6, *given), control)
    assert not torch.equal(RandomBlocks(2)(5, *given), control)
