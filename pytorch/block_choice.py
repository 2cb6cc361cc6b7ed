"""Which key blocks a tile of rows keeps, in torch: exact scores of sampled rows, then a threshold.

The rule is `custom_ops.block_sparse.rule`, here for all heads at once. Where tiles begin and which
of them are sparse are whole numbers of the host, so that nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad
from trianglemix.custom_ops.block_sparse.contract import SAMPLE_STEP, TILE, BlockRule
from trianglemix.pytorch.layout import Rows

SCORES: Final = 2**25
"""Sampled scores held at a time, in float32: 128 MB."""


@dataclass(frozen=True)
class BlockSparse:
    """One layer's attention: its rule, `scale` of the scores, `softcap` (0 = none)."""

    rule: BlockRule
    scale: float
    softcap: float = 0.0


BlockChooser = Callable[[int, Tensor, Tensor, Rows, BlockSparse], Tensor]
"""Layer, `query [B, H, S, D]`, `key [B, G, T, D]` -> bool `[B, H, C, C]` as `choose_blocks`."""


@dataclass(frozen=True)
class TileSpan:
    """Sparse tiles `begin` to `end - 1` of prompts with one first and one last token.

    The call's rows are the slots `start` to `stop - 1`; `prompt_length` is N.
    """

    first_valid: int
    prompt_length: int
    start: int
    stop: int
    begin: int
    end: int

    @property
    def is_empty(self) -> bool:
        """Whether every row of the call is dense."""
        return self.begin == self.end

    @property
    def rows(self) -> slice:
        """The tiles' rows among the call's."""
        first = self.first_valid - self.start
        stop = min(self.stop - self.start, first + TILE * self.end)
        return slice(first + TILE * self.begin, stop)

    def sampled(self, step: int = SAMPLE_STEP) -> slice:
        """The rows that are looked at, among the call's: each `step`th of a tile that is there."""
        rows = self.rows
        stop = min(rows.stop, self.prompt_length - self.start)
        return slice(rows.start + step - 1, stop, step)

    @property
    def keys(self) -> slice:
        """The slots that the tiles may keep."""
        return slice(self.first_valid, min(self.stop, self.first_valid + TILE * self.end))

    def pieces(self, tiles: int) -> Iterator[TileSpan]:
        """The span in parts of at most so many tiles."""
        for begin in range(self.begin, self.end, tiles):
            yield replace(self, begin=begin, end=min(begin + tiles, self.end))


def sparse_spans(
    rows: Rows, length: int, rule: BlockRule
) -> list[tuple[TileSpan, slice | list[int]]]:
    """The sparse tiles of a call of `length` new rows, with the batch rows that they belong to.

    A span for each group of batch rows that share their first and last token; it may be empty.
    """
    groups = rows.groups().items()
    return [
        (
            _span(*ends, rows.start, rows.start + length, rule),
            slice(None) if len(groups) == 1 else m,
        )
        for ends, m in groups
    ]


def _span(first: int, prompt: int, start: int, stop: int, rule: BlockRule) -> TileSpan:
    """Dense are tiles that begin before the call, that hold last rows, that have no sample."""
    begin = max(0, -(-(start - first) // TILE))
    end = min(
        (prompt - rule.num_last_tokens - first) // TILE,
        (min(prompt, stop) - SAMPLE_STEP - first) // TILE + 1,
    )
    if rule.is_dense or prompt - first <= rule.min_length:
        end = begin
    return TileSpan(first, prompt, start, stop, begin, max(begin, end))


def choose_blocks(query: Tensor, key: Tensor, rows: Rows, attention: BlockSparse) -> Tensor:
    """The operator's `block_mask`, bool `[B, H, C, C]` (tile, block), `C = ceil(T/128)`.

    `query [B, H, S, D]` and `key [B, G, T, D]` as stored. Every causal block of a dense tile is
    kept; tiles without a row in this call keep none.
    """
    mask = dense_blocks(query, key, rows)
    for span, batch in sparse_spans(rows, query.shape[2], attention.rule):
        q, k = query[batch], key[batch]
        for piece in span.pieces(tiles_at_once(q, span)):
            kept = kept_blocks(block_sums(q, k, piece, attention), piece.begin, attention.rule)
            mask[batch, :, piece.begin : piece.end, : piece.end] = kept
    return mask


def dense_blocks(query: Tensor, key: Tensor, rows: Rows) -> Tensor:
    """Every causal block of the call's tiles; shapes as in `choose_blocks`."""
    B, H, S, _ = query.shape
    size = -(-key.shape[2] // TILE)
    mask = torch.zeros(B, H, size, size, dtype=torch.bool, device=query.device)
    causal = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    for (first, _), members in rows.groups().items():
        here = slice(
            max(0, rows.start - first) // TILE, max(0, -(-(rows.start + S - first) // TILE))
        )
        mask[members, :, here] = causal[here]
    return mask


def block_sums(
    query: Tensor, key: Tensor, span: TileSpan, attention: BlockSparse, step: int = SAMPLE_STEP
) -> Tensor:
    """`[B, H, tiles, span.end]` float32: the sampled rows' probabilities, summed by block.

    `step` 1 looks at every row, which is what the rule estimates.
    """
    rows = query[:, :, span.sampled(step)]
    shares = _probabilities(rows, key[:, :, span.keys], span, attention, step)
    B, H, R, K = shares.shape
    tiles = span.end - span.begin
    if TILE * span.end > K:
        shares = pad(shares, (0, TILE * span.end - K))
    sums = shares.view(B, H, R, span.end, TILE).sum(-1)
    if tiles * TILE > R * step:
        sums = pad(sums, (0, 0, 0, tiles * TILE // step - R))
    return sums.view(B, H, tiles, TILE // step, span.end).sum(3)


def _probabilities(
    rows: Tensor, keys: Tensor, span: TileSpan, attention: BlockSparse, step: int
) -> Tensor:
    """`[B, H, R, K]` float32 of `rows [B, H, R, D]` over their causal `keys [B, G, K, D]`."""
    B, H, R, D = rows.shape
    G, K = keys.shape[1:3]
    packed = rows.reshape(B, G, H // G * R, D).float()
    scores = (packed @ keys.float().transpose(2, 3)).view(B, H, R, K) * attention.scale
    if attention.softcap:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    place = TILE * span.begin + step * torch.arange(1, R + 1, device=rows.device) - 1
    later = torch.arange(K, device=rows.device) > place[:, None]
    return torch.softmax(scores.masked_fill_(later, float("-inf")), -1)


def kept_blocks(sums: Tensor, begin: int, rule: BlockRule) -> Tensor:
    """Which blocks the tiles from `begin` on keep, by their `sums [..., tiles, blocks]`; bool."""
    tiles, blocks = sums.shape[-2:]
    tile = torch.arange(begin, begin + tiles, device=sums.device)[:, None]
    block = torch.arange(blocks, device=sums.device)
    kept = (sums >= threshold(sums, rule.mass)) | forced_blocks(tile, block, rule)
    return kept & (block <= tile)


def forced_blocks(tile: Tensor, block: Tensor, rule: BlockRule) -> Tensor:
    """Blocks that a tile keeps whatever they hold: the sinks' and the window's."""
    near = (TILE * tile - rule.sliding_window_size + 1) // TILE
    return (TILE * block < rule.num_sink_tokens) | (block >= near)


def threshold(sums: Tensor, mass: float) -> Tensor:
    """`[..., 1]`: as `rule.threshold`, over the last dimension."""
    largest_first = sums.sort(-1, descending=True).values
    reached = largest_first.cumsum(-1)
    index = (reached < mass * reached[..., -1:]).sum(-1, keepdim=True)
    return largest_first.gather(-1, index.clamp(max=sums.shape[-1] - 1))


def tiles_at_once(query: Tensor, span: TileSpan, step: int = SAMPLE_STEP) -> int:
    """How many tiles' scores are held at a time."""
    of_a_tile = query.shape[0] * query.shape[1] * (TILE // step) * TILE * span.end
    return max(1, SCORES // max(1, of_a_tile))


def by_the_rule(
    layer: int, query: Tensor, key: Tensor, rows: Rows, attention: BlockSparse
) -> Tensor:
    return choose_blocks(query, key, rows, attention)


_CHOOSER: Final[ContextVar[BlockChooser]] = ContextVar(
    "trianglemix_block_chooser", default=by_the_rule
)


def current_chooser() -> BlockChooser:
    """The rule, or what `choosing_blocks` put in its place."""
    return _CHOOSER.get()


@contextmanager
def choosing_blocks(chooser: BlockChooser) -> Iterator[None]:
    """Has the block-sparse layers ask `chooser` in place of the rule; it may ask the rule itself.

    To look at what is kept, or to keep something else. Calls without a sparse tile do not ask.
    """
    token = _CHOOSER.set(chooser)
    try:
        yield
    finally:
        _CHOOSER.reset(token)
