"""How much the block-sparse layers keep: counted while a model reads its prompts."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from trianglemix.pytorch.block_choice import (
    BlockChooser,
    BlockSparse,
    choose_blocks,
    choosing_blocks,
    dense_blocks,
)
from trianglemix.pytorch.layout import Rows


class KeptShares:
    """Kept share of causal block pairs by layer, summed on the device until it is asked for."""

    def __init__(self) -> None:
        self._shares: dict[int, list[Tensor]] = {}

    def watching(self, chooser: BlockChooser | None = None) -> AbstractContextManager[None]:
        """Counts what `chooser`, or the rule, keeps inside the context."""

        def look(
            layer: int, query: Tensor, key: Tensor, rows: Rows, attention: BlockSparse
        ) -> Tensor:
            given = query, key, rows, attention
            kept = chooser(layer, *given) if chooser else choose_blocks(*given)
            share = kept.sum() / dense_blocks(query, key, rows).sum()
            self._shares.setdefault(layer, []).append(share)
            return kept

        return choosing_blocks(look)

    def by_layer(self) -> dict[int, float]:
        """The mean over the calls that had a sparse tile; empty where none had."""
        return {
            layer: float(torch.stack(shares).float().mean())
            for layer, shares in sorted(self._shares.items())
        }
