"""One prompt through a model: what the block-sparse rule would keep in each layer, and how well.

The model runs with its triangle layers and all other layers dense. In each layer that is looked at,
the rule chooses blocks at several masses, and the attention of every row says how much they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from trianglemix.analysis.block_shares import BlockFigures, BlockSample
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch import TriangleMixConfig, choosing_blocks, patch, unpatch
from trianglemix.pytorch.block_choice import (
    BlockSparse,
    TileSpan,
    block_sums,
    dense_blocks,
    forced_blocks,
    kept_blocks,
    sparse_spans,
    tiles_at_once,
)
from trianglemix.pytorch.layout import Rows

_LOW: Final = 0.05


@dataclass(frozen=True)
class BlockProbe:
    """Which layers are triangle layers, which are looked at, and the masses to try."""

    pattern: TrianglePattern
    triangle_layers: tuple[int, ...]
    layers: tuple[int, ...]
    masses: tuple[float, ...]

    def __call__(self, model: nn.Module, ids: Sequence[int], tokens: int) -> BlockSample:
        """The figures of one prompt; it counts as one of `tokens` tokens.

        Raises:
            UnsupportedModelError: a layer is no plain causal attention.
        """
        config = replace(
            TriangleMixConfig.from_pattern(self.pattern, self.triangle_layers),
            block_sparse_layer_indices=self.layers,
            block_rule=BlockRule(min_length=0),  # a mass of 1 among them would make it dense
        )
        meter = _Meter(self.masses)
        any_model: Any = patch(model, config)
        try:
            with torch.inference_mode(), choosing_blocks(meter):
                tensor = torch.tensor([list(ids)], device=any_model.device)
                any_model(tensor, use_cache=False, logits_to_keep=1)
        finally:
            unpatch(model)
        return BlockSample(tokens, [meter.found[layer] for layer in self.layers])


class _Meter:
    """A chooser that keeps everything, and notes what the rule would keep."""

    def __init__(self, masses: Sequence[float]) -> None:
        self._masses = masses
        self.found: dict[int, list[list[float]]] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, rows: Rows, attention: BlockSparse
    ) -> Tensor:
        ((span, _),) = sparse_spans(rows, query.shape[2], attention.rule)
        everything = dense_blocks(query, key, rows)
        pieces = [
            _piece_counts(query, key, piece, attention, self._masses)
            for piece in span.pieces(tiles_at_once(query, span, 1))
        ]
        dense = everything.sum() - everything[:, :, span.begin : span.end].sum()
        counts = torch.stack([counts for counts, _ in pieces]).sum(0)  # [masses, 2]
        densities = (counts + dense) / everything.sum()
        recalls = torch.cat([recall for _, recall in pieces], -1)  # [masses, H, tiles]
        low = torch.quantile(recalls.flatten(1), _LOW, dim=1)
        columns = (*densities.unbind(1), recalls.mean((1, 2)), low, recalls.mean(2).amin(1))
        self.found[layer] = torch.stack([x.double() for x in columns], 1).tolist()
        assert len(columns) == len(BlockFigures.__dataclass_fields__)
        return everything


def _piece_counts(
    query: Tensor, key: Tensor, piece: TileSpan, attention: BlockSparse, masses: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Kept blocks by the rule and by all rows `[masses, 2]`; recalls `[masses, H, tiles]`."""
    sampled = block_sums(query, key, piece, attention)[0]
    whole = block_sums(query, key, piece, attention, step=1)[0]
    tile = torch.arange(piece.begin, piece.end, device=query.device)
    block = torch.arange(piece.end, device=query.device)
    forced = forced_blocks(tile[:, None], block, attention.rule) & (block <= tile[:, None])
    may_drop = forced.sum(-1) <= tile
    counts, recalls = [], []
    for mass in masses:
        rule = replace(attention.rule, mass=mass)
        kept, exact = (kept_blocks(sums, piece.begin, rule) for sums in (sampled, whole))
        counts.append(torch.stack([kept.sum(), exact.sum()]))
        recalls.append((whole * kept).sum(-1)[:, may_drop] / whole.sum(-1)[:, may_drop])
    return torch.stack(counts), torch.stack(recalls)
