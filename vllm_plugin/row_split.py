"""Which rows of one engine step run our attention and which stay dense: whole numbers, no tensors.

A step holds rows of several requests, one after another. A request's rows are its newest tokens:
of a request of `T` tokens so far, the rows `[a, b)` of the step are its positions `T - (b - a)` to
`T - 1`. In a layer of either role the rows that are ours are one range of positions:

    triangle       those that stream. By `keep(i, j) = j <= i and (j < sink or i - j < window or
                   i >= N - last)` a position drops a key exactly where
                   `sink + window <= i < N - last`
    block-sparse   those of sparse tiles (`custom_ops.block_sparse.rule.Rows.is_dense`): tiles of
                   128 positions that begin in this step, have a row that is looked at, and none of
                   the prompt's last rows
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from trianglemix.custom_ops.arrays import IntArray
from trianglemix.custom_ops.block_sparse.contract import SAMPLE_STEP, TILE, BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm.roles import Keeps

Length = TypeVar("Length", int, IntArray)


@dataclass(frozen=True)
class Request:
    """One request of a step: its rows `[begin, end)`, its tokens so far, its prompt's length `N`.

    `tokens` counts this step's rows too. A request without rows pads the step.
    """

    begin: int
    end: int
    tokens: int
    prompt_length: int


@dataclass(frozen=True)
class Segment:
    """Rows `[begin, end)` of the step: the newest of the first `keys` tokens of a request.

    So a causal mask whose corner is at the bottom right fits them. `request` counts from 0;
    `is_newest` says that `keys` are all the tokens that the request has; `prompt_length` is its N.
    """

    begin: int
    end: int
    keys: int
    request: int
    is_newest: bool
    prompt_length: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.end - self.begin


@dataclass(frozen=True)
class RowSplit:
    """Every row of a step, in the order of the step: those that are ours and those that are dense.

    Ours are a triangle layer's streaming rows, a block-sparse layer's rows of sparse tiles.
    """

    ours: tuple[Segment, ...]
    dense: tuple[Segment, ...]

    @property
    def our_rows(self) -> int:
        """Rows that do not see every key before them."""
        return sum(segment.rows for segment in self.ours)

    @property
    def dense_rows(self) -> int:
        """Rows that see every key before them."""
        return sum(segment.rows for segment in self.dense)


def split_rows(requests: Iterable[Request], keeps: Keeps) -> RowSplit:
    """The rows of a step by what they keep. Rows of padding are in neither part."""
    ours: list[Segment] = []
    dense: list[Segment] = []
    for index, request in enumerate(requests):
        for segment, is_ours in _segments(index, request, keeps):
            (ours if is_ours else dense).append(segment)
    return RowSplit(tuple(ours), tuple(dense))


def _segments(index: int, request: Request, keeps: Keeps) -> Iterable[tuple[Segment, bool]]:
    """A request's rows in at most three pieces: early and dense, ours, last and dense."""
    first, stop = request.tokens - (request.end - request.begin), request.tokens
    prompt = request.prompt_length
    begins, ends = map(int, our_span(first, stop, prompt, keeps))
    cuts = [first, min(max(begins, first), stop), min(max(ends, first), stop), stop]
    if cuts[2] <= cuts[1]:
        cuts = [first, stop, stop, stop]
    shift = request.begin - first
    for piece, (low, high) in enumerate(pairwise(cuts)):
        if low < high:
            segment = Segment(low + shift, high + shift, high, index, high == stop, prompt)
            yield segment, piece == 1


def our_span(
    first: Length, stop: Length, prompt_length: Length, keeps: Keeps
) -> tuple[Length, Length]:
    """Positions `[begin, end)` that are ours; empty where `end <= begin`.

    The rows of a request are its positions `first` to `stop - 1`. Numbers, or arrays of them.
    """
    if isinstance(keeps, TrianglePattern):
        return _streaming_span(prompt_length, keeps)
    return _sparse_span(first, stop, prompt_length, keeps)


def _streaming_span(prompt_length: Length, pattern: TrianglePattern) -> tuple[Length, Length]:
    nothing = prompt_length * 0
    if pattern.is_dense:
        return nothing, nothing
    span = pattern.num_sink_tokens + pattern.sliding_window_size
    return nothing + span, prompt_length - pattern.num_last_tokens


def _sparse_span(
    first: Length, stop: Length, prompt_length: Length, rule: BlockRule
) -> tuple[Length, Length]:
    """The rows of the tiles `begin` to `end - 1`: one after another, since only ends are dense."""
    begin = -(-first // TILE)
    if rule.is_dense:
        return TILE * begin, TILE * begin
    before_last = (prompt_length - rule.num_last_tokens) // TILE
    sampled = (stop - SAMPLE_STEP) // TILE + 1  # their rows are before the last ones, so before N
    end = np.minimum(before_last, sampled) * (prompt_length > rule.min_length)
    return TILE * begin, np.minimum(stop, TILE * end)
