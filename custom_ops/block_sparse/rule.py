"""Which key blocks a tile of rows keeps, for one head: the rule, apart from any attention.

Tile `t` holds the buffer's slots `first_valid + 128 t` to `+ 127`, block `b` likewise; a tile has
blocks up to its own. `N` is the prompt's end, `L` the end of the row's keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.block_sparse.contract import SAMPLE_STEP, TILE, BlockRule


@dataclass(frozen=True)
class Rows:
    """One batch row of a call, in slots of the buffer: new rows are `start` to `end - 1`."""

    first_valid: int
    start: int
    end: int  # L
    prompt_length: int  # N

    @property
    def num_tiles(self) -> int:
        """Tiles, and blocks, that hold a key."""
        return max(0, -(-(self.end - self.first_valid) // TILE))

    def first_slot(self, tile: int) -> int:
        """The first slot of a tile or block."""
        return self.first_valid + TILE * tile

    def sampled(self, tile: int) -> Array:
        """Slots of the rows of a tile that are looked at: of this call, and of the prompt."""
        slots = self.first_slot(tile) + np.arange(SAMPLE_STEP - 1, TILE, SAMPLE_STEP)
        end = min(self.prompt_length, self.end)
        rows: Array = slots[(slots >= self.start) & (slots < end)]
        return rows

    def has_rows(self, tile: int) -> bool:
        """Whether a row of the tile is in this call."""
        return self.first_slot(tile) + TILE > self.start and self.first_slot(tile) < self.end

    def is_dense(self, tile: int, rule: BlockRule) -> bool:
        """Whether a tile keeps all its blocks without a look at the scores.

        So it is for the last rows of the prompt and all after it, for a tile whose first row came
        in an earlier call (its sample would not be whole), and for short prompts.
        """
        return bool(
            rule.is_dense
            or self.prompt_length - self.first_valid <= rule.min_length
            or self.first_slot(tile) + TILE > self.prompt_length - rule.num_last_tokens
            or self.first_slot(tile) < self.start
            or not len(self.sampled(tile))
        )


def forced_blocks(tile: int, rule: BlockRule) -> BoolArray:
    """`[tile + 1]`: blocks that a tile keeps whatever they hold, the sinks' and the window's."""
    block = np.arange(tile + 1)
    near = (TILE * tile - rule.sliding_window_size + 1) // TILE
    forced: BoolArray = (TILE * block < rule.num_sink_tokens) | (block >= near)
    return forced


def block_sums(probabilities: Array, first_valid: int, num_blocks: int) -> Array:
    """`[num_blocks]` sums of `probabilities [R, L]` over the sampled rows and a block's keys."""
    masses = probabilities.sum(axis=0)[first_valid:]
    padded = np.pad(masses, (0, num_blocks * TILE - len(masses)))
    sums: Array = padded.reshape(num_blocks, TILE).sum(axis=1)
    return sums


def threshold(sums: Array, mass: float) -> float:
    """The largest number so that the blocks that hold at least as much hold `mass` of the whole.

    `sums` are the block sums of a tile; the whole is their sum, one for each sampled row.
    """
    largest_first = np.sort(sums)[::-1]
    enough = np.cumsum(largest_first) >= mass * largest_first.sum()
    return float(largest_first[int(np.argmax(enough))])


def kept_blocks(sums: Array, tile: int, rule: BlockRule) -> BoolArray:
    """`[tile + 1]`: the blocks that a tile keeps, by its block sums `[tile + 1]`."""
    kept: BoolArray = (sums >= threshold(sums, rule.mass)) | forced_blocks(tile, rule)
    return kept


def undecided_blocks(sums: Array, tile: int, rule: BlockRule, band: float) -> BoolArray:
    """`[tile + 1]`: blocks that rounding may keep or leave out; a kernel may choose among them.

    `band` is how far, as a share, a sum and the mass that is reached may be off.
    """
    least = threshold(sums, max(rule.mass - band, np.finfo(np.float64).tiny)) * (1 + band)
    most = threshold(sums, min(rule.mass + band, 1.0)) * (1 - band)
    open_: BoolArray = (sums < least) & (sums >= most) & ~forced_blocks(tile, rule)
    return open_
