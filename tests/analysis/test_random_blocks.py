"""The control keeps as many blocks as the rule, the forced ones among them, and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trianglemix.analysis.random_blocks import RandomBlocks
from trianglemix.analysis.trials import BlockTaskScorer
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.evaluation.run import Setup
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


class _Model:
    """What a trial asks of a model: which layers, and who chooses their blocks."""

    tokenizer = facts = None
    chooser: RandomBlocks | None = None

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []

    def use_layers(self, layers: Sequence[int], blocks: Sequence[int] = ()) -> None:
        self.layers = tuple(layers), tuple(blocks)

    def peak_memory_mb(self) -> None:
        self.seen.append((*self.layers, self.chooser is not None))


def test_a_trial_is_the_plan_alone_the_rule_or_chance() -> None:
    model: Any = _Model()
    score = BlockTaskScorer(model, Setup((), 100, 1), ((4, 6), (0, 1)), lambda text: None)
    for kind in ("none", "rule", "random", "rule"):
        score(kind)
    rule, chance = ((4, 6), (0, 1), False), ((4, 6), (0, 1), True)
    assert model.seen == [((4, 6), (), False), rule, chance, rule]
