"""Which rows are ours, against predicate and rule: generated steps of many requests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.rule import Rows
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.row_split import Request, Segment, split_rows

PATTERNS = st.builds(
    TrianglePattern, st.integers(0, 6), st.integers(1, 20), st.integers(1, 12)
) | st.just(DENSE_PATTERN)
RULES = st.builds(
    BlockRule, mass=st.sampled_from([0.3, 0.6, 0.9, 1.0]), min_length=st.sampled_from([0, 200]),
    num_sink_tokens=st.sampled_from([0, 4, 130]), sliding_window_size=st.sampled_from([-1, 1, 128]),
    num_last_tokens=st.sampled_from([1, 8, 128, 200]),
)  # fmt: skip


@st.composite
def steps(draw: st.DrawFn, longest: int = 90) -> list[Request]:
    """Requests one after another: prompts whole or in chunks, decodes, guesses, padding."""
    requests, begin = [], 0
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(0, longest))
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


def _drops(position: int, request: Request, keeps: Keeps) -> bool:
    """Whether a row is one that may drop keys, by the one definition of its role."""
    if isinstance(keeps, TrianglePattern):
        kept = keep(position, np.arange(position + 1), keeps, request.prompt_length)
        return not bool(kept.all())
    rows = Rows(0, _first(request), request.tokens, request.prompt_length)
    return not rows.is_dense(position // TILE, keeps)


def _first(request: Request) -> int:
    return request.tokens - (request.end - request.begin)


@given(steps(), PATTERNS)
@example([Request(0, 1, 31, 40)], TrianglePattern(4, 20, 8))  # a chunk of one row that streams
def test_rows_stream_exactly_where_the_predicate_drops_a_key(
    requests: list[Request], pattern: TrianglePattern
) -> None:
    _check_rows(requests, pattern)


@given(steps(longest=800), RULES)
@example([Request(0, 272, 400, 700)], BlockRule(0.5, 0, num_last_tokens=8))  # ends at row 15
@example([Request(0, 271, 399, 700)], BlockRule(0.5, 0, num_last_tokens=8))  # ends before it
@example([Request(0, 200, 200, 200)], BlockRule(0.5, 200, num_last_tokens=8))  # short enough
@example([Request(0, 201, 201, 201)], BlockRule(0.5, 200, num_last_tokens=8))  # one too many
def test_rows_are_ours_exactly_in_the_rule_s_sparse_tiles(
    requests: list[Request], rule: BlockRule
) -> None:
    _check_rows(requests, rule)


def _check_rows(requests: list[Request], keeps: Keeps) -> None:
    split = split_rows(requests, keeps)
    found: dict[int, tuple[Segment, bool]] = {}
    for segments, are_ours in ((split.ours, True), (split.dense, False)):
        for segment in segments:
            for row in range(segment.begin, segment.end):
                assert row not in found, "a row is in two segments"
                found[row] = (segment, are_ours)
    for index, request in enumerate(requests):
        for row in range(request.begin, request.end):
            segment, are_ours = found.pop(row)
            position = request.tokens - request.end + row
            assert (segment.request, segment.prompt_length) == (index, request.prompt_length)
            assert segment.keys - segment.end + row == position, "the mask's corner is elsewhere"
            assert segment.is_newest == (segment.keys == request.tokens)
            assert are_ours == _drops(position, request, keeps)
    assert not found, "rows that no request has"


@given(steps(longest=800), RULES)
def test_a_segment_of_sparse_tiles_is_a_call_by_itself(
    requests: list[Request], rule: BlockRule
) -> None:
    """It begins at a tile's edge; alone, its tiles are sparse, by the same rows."""
    for segment in split_rows(requests, rule).ours:
        request = requests[segment.request]
        whole = Rows(0, _first(request), request.tokens, request.prompt_length)
        alone = Rows(0, segment.keys - segment.rows, segment.keys, segment.prompt_length)
        assert alone.start % TILE == 0
        for tile in range(alone.start // TILE, alone.num_tiles):
            assert not alone.is_dense(tile, rule)
            assert alone.sampled(tile).tolist() == whole.sampled(tile).tolist()


@given(steps(), PATTERNS)
def test_segments_are_as_few_as_can_be(requests: list[Request], pattern: TrianglePattern) -> None:
    """One for each change between dense and streaming rows of a request."""
    split = split_rows(requests, pattern)
    changes = 0
    for request in requests:
        kinds = [_drops(i, request, pattern) for i in range(_first(request), request.tokens)]
        changes += bool(kinds) + sum(a != b for a, b in pairwise(kinds))
    assert len(split.ours) + len(split.dense) == changes
    assert split.our_rows + split.dense_rows == sum(r.end - r.begin for r in requests)


@pytest.mark.parametrize("length", [647, 648])
def test_short_prompts_are_dense(length: int) -> None:
    split = split_rows([Request(0, length, length, length)], TrianglePattern())
    assert not split.ours
    assert split.dense == (Segment(0, length, length, 0, True, length),)


def test_a_prompt_one_longer_streams_one_row() -> None:
    (segment,) = split_rows([Request(0, 649, 649, 649)], TrianglePattern()).ours
    assert segment == Segment(520, 521, 521, 0, False, 649)
