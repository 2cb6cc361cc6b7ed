"""Which rows stream, against the predicate: generated steps of many requests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep
from trianglemix.vllm.row_split import Request, Segment, split_rows

PATTERNS = st.builds(
    TrianglePattern, st.integers(0, 6), st.integers(1, 20), st.integers(1, 12)
) | st.just(DENSE_PATTERN)


@st.composite
def steps(draw: st.DrawFn) -> list[Request]:
    """Requests one after another: prompts whole or in chunks, decodes, guesses, padding."""
    requests, begin = [], 0
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(0, 90))
        kind = draw(st.sampled_from(["whole", "chunk", "decode", "padding"]))
        tokens = length + draw(st.integers(1, 9)) if kind == "decode" else length
        if kind == "chunk":
            tokens = draw(st.integers(min(1, length), length))
        rows = draw(st.integers(0, tokens))
        if kind in ("whole", "padding"):
            rows = tokens if kind == "whole" else 0
        requests.append(Request(begin, begin + rows, tokens, length))
        begin += rows
    return requests


def _drops(position: int, request: Request, pattern: TrianglePattern) -> bool:
    kept = keep(position, np.arange(position + 1), pattern, request.prompt_length)
    return not bool(kept.all())


@given(steps(), PATTERNS)
@example([Request(0, 1, 31, 40)], TrianglePattern(4, 20, 8))  # a chunk of one row that streams
def test_rows_stream_exactly_where_the_predicate_drops_a_key(
    requests: list[Request], pattern: TrianglePattern
) -> None:
    split = split_rows(requests, pattern)
    found: dict[int, tuple[Segment, bool]] = {}
    for segments, streams in ((split.streaming, True), (split.dense, False)):
        for segment in segments:
            for row in range(segment.begin, segment.end):
                assert row not in found, "a row is in two segments"
                found[row] = (segment, streams)
    for index, request in enumerate(requests):
        for row in range(request.begin, request.end):
            segment, streams = found.pop(row)
            position = request.tokens - request.end + row
            assert segment.request == index
            assert segment.keys - segment.end + row == position, "the mask's corner is elsewhere"
            assert segment.is_newest == (segment.keys == request.tokens)
            assert streams == _drops(position, request, pattern)
    assert not found, "rows that no request has"


@given(steps(), PATTERNS)
def test_segments_are_as_few_as_can_be(requests: list[Request], pattern: TrianglePattern) -> None:
    """One for each change between dense and streaming rows of a request."""
    split = split_rows(requests, pattern)
    changes = 0
    for request in requests:
        first = request.tokens - (request.end - request.begin)
        kinds = [_drops(i, request, pattern) for i in range(first, request.tokens)]
        changes += bool(kinds) + sum(a != b for a, b in pairwise(kinds))
    assert len(split.streaming) + len(split.dense) == changes
    assert split.streaming_rows + split.dense_rows == sum(r.end - r.begin for r in requests)


@pytest.mark.parametrize("length", [647, 648])
def test_short_prompts_are_dense(length: int) -> None:
    split = split_rows([Request(0, length, length, length)], TrianglePattern())
    assert not split.streaming
    assert split.dense == (Segment(0, length, length, 0, True),)


def test_a_prompt_one_longer_streams_one_row() -> None:
    (segment,) = split_rows([Request(0, 649, 649, 649)], TrianglePattern()).streaming
    assert segment == Segment(520, 521, 521, 0, False)
