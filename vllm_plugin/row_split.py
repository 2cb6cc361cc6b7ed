"""Which rows of one engine step stream and which stay dense: whole numbers, no tensors.

A step holds rows of several requests, one after another. A request's rows are its newest tokens:
of a request of `T` tokens so far, the rows `[a, b)` of the step are its positions `T - (b - a)` to
`T - 1`. By `keep(i, j) = j <= i and (j < sink or i - j < window or i >= N - last)` a position
`i` drops a key exactly where `sink + window <= i < N - last`; those rows stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from trianglemix.custom_ops.arrays import IntArray
from trianglemix.custom_ops.triangle.contract import TrianglePattern

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
    `is_newest` says that `keys` are all the tokens that the request has.
    """

    begin: int
    end: int
    keys: int
    request: int
    is_newest: bool

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.end - self.begin


@dataclass(frozen=True)
class RowSplit:
    """Every row of a step, in the order of the step: those that stream and those that are dense."""

    streaming: tuple[Segment, ...]
    dense: tuple[Segment, ...]

    @property
    def streaming_rows(self) -> int:
        """Rows that see sinks and window only."""
        return sum(segment.rows for segment in self.streaming)

    @property
    def dense_rows(self) -> int:
        """Rows that see every key before them."""
        return sum(segment.rows for segment in self.dense)


def split_rows(requests: Iterable[Request], pattern: TrianglePattern) -> RowSplit:
    """The rows of a step by what they keep under `pattern`. Rows of padding are in neither part."""
    streaming: list[Segment] = []
    dense: list[Segment] = []
    for index, request in enumerate(requests):
        for segment, streams in _segments(index, request, pattern):
            (streaming if streams else dense).append(segment)
    return RowSplit(tuple(streaming), tuple(dense))


def _segments(
    index: int, request: Request, pattern: TrianglePattern
) -> Iterable[tuple[Segment, bool]]:
    """A request's rows in at most three pieces: early and dense, streaming, last and dense."""
    first, stop = request.tokens - (request.end - request.begin), request.tokens
    begins, ends = streaming_span(request.prompt_length, pattern)
    cuts = [first, min(max(begins, first), stop), min(max(ends, first), stop), stop]
    if cuts[2] <= cuts[1]:
        cuts = [first, stop, stop, stop]
    shift = request.begin - first
    for piece, (low, high) in enumerate(pairwise(cuts)):
        if low < high:
            yield Segment(low + shift, high + shift, high, index, high == stop), piece == 1


def streaming_span(prompt_length: Length, pattern: TrianglePattern) -> tuple[int, Length]:
    """Positions `[begin, end)` that drop a key; empty where `end <= begin`.

    `prompt_length` is a number, or an array of them.
    """
    if pattern.is_dense:
        return 0, prompt_length * 0
    span = pattern.num_sink_tokens + pattern.sliding_window_size
    return span, prompt_length - pattern.num_last_tokens
