"""Where the calls end that a prompt is read in."""

from __future__ import annotations

import numpy as np
from trianglemix.custom_ops.arrays import BoolArray
from trianglemix.custom_ops.block_sparse.contract import TILE


def first_slots(real: BoolArray) -> tuple[int, ...]:
    """Each row's first real slot of `[B, T]`."""
    return tuple(np.argmax(real, axis=1).tolist())


def share_edges(lengths: list[int]) -> bool:
    """Whether rows of these lengths, aligned on the right, have their tiles at the same slots."""
    return len({length % TILE for length in lengths}) == 1


def chunk_ends(begin: int, end: int, chunk: int | None, first: int | None) -> list[int]:
    """Ends of the calls that read the slots from `begin` to `end`, of at most `chunk` tokens.

    With `first`, the first slot of a row of a model with block-sparse layers, calls end on the
    edges of its tiles, since the tile that a chunk cuts is dense, which one pass would not make it;
    a chunk is then a tile at least.
    """
    if chunk is None:
        return [end]
    ends: list[int] = []
    while begin < end:
        stop = begin + chunk
        if first is not None:
            stop = begin + max(chunk, TILE)
            stop -= (stop - first) % TILE
        begin = min(end, stop)
        ends.append(begin)
    return ends
