"""T0: the predicate has the properties that the specification claims."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep, keep_mask, kept_pairs, key_intervals

PATTERNS = st.builds(
    TrianglePattern,
    num_sink_tokens=st.integers(0, 12),
    sliding_window_size=st.one_of(st.just(-1), st.integers(1, 40)),
    num_last_tokens=st.integers(1, 40),
)
LENGTHS = st.integers(1, 90)


def literal_mask(length: int, si: int, sl: int, last: int, base: int) -> np.ndarray:
    """The paper's formulas as printed, with indices that start at `base`: Streaming + Last."""
    i = np.arange(length)[:, None] + base
    j = np.arange(length)[None, :] + base
    return (i >= j) & ((j <= si) | (i - j <= sl) | (length - i < last))


@given(LENGTHS, PATTERNS)
def test_every_row_keeps_itself_and_nothing_ahead(length: int, pattern: TrianglePattern) -> None:
    mask = keep_mask(length, pattern)
    assert mask.diagonal().all()
    assert not np.triu(mask, 1).any()


@given(PATTERNS, st.data())
def test_short_prompts_drop_nothing(pattern: TrianglePattern, data: st.DataObject) -> None:
    longest = pattern.exact_length or 200
    length = data.draw(st.integers(1, longest))
    assert (keep_mask(length, pattern) == np.tri(length, dtype=bool)).all()


def test_one_token_more_than_the_exact_length_drops_one_pair() -> None:
    pattern = TrianglePattern(3, 5, 4)
    length = (pattern.exact_length or 0) + 1
    assert keep_mask(length, pattern).sum() == length * (length + 1) // 2 - 1


@given(LENGTHS, PATTERNS)
def test_decode_rows_are_dense(length: int, pattern: TrianglePattern) -> None:
    assert keep(length - 1, np.arange(length), pattern, length).all()


@given(LENGTHS, PATTERNS)
def test_kept_pairs_counts_the_mask(length: int, pattern: TrianglePattern) -> None:
    assert kept_pairs(length, pattern) == keep_mask(length, pattern).sum()


@given(LENGTHS, PATTERNS, st.data())
def test_intervals_are_the_mask(length: int, pattern: TrianglePattern, data: st.DataObject) -> None:
    first_valid = data.draw(st.integers(0, length - 1))
    mask = keep_mask(length, pattern, first_valid)
    for row in range(length):
        visited = np.zeros(length, bool)
        for start, stop in key_intervals(row, row, pattern, length, first_valid):
            assert not visited[start:stop].any()
            visited[start:stop] = True
        assert (visited == mask[row]).all()


@given(LENGTHS, PATTERNS, st.integers(0, 30))
def test_left_pads_only_shift_the_pattern(length: int, pattern: TrianglePattern, pads: int) -> None:
    padded = keep_mask(length + pads, pattern, first_valid=pads)
    assert (padded[pads:, pads:] == keep_mask(length, pattern)).all()
    assert not padded[:, :pads].any()


@given(LENGTHS, st.integers(0, 12), st.integers(0, 40), st.integers(2, 40))
def test_other_spellings_convert_exactly(length: int, sink: int, window: int, last: int) -> None:
    paper = TrianglePattern.from_paper(sink, window, last)
    assert (keep_mask(length, paper) == literal_mask(length, sink, window, last, 1)).all()
    card = TrianglePattern.from_reference_card(sink, window, last)
    assert (keep_mask(length, card) == literal_mask(length, sink, window, last, 0)).all()
    assert TrianglePattern.from_minference(sink, window + 1, last) == paper


@given(LENGTHS, st.integers(0, 12), st.integers(1, 40), st.integers(1, 40))
def test_vllm_ascend_spelling(length: int, sink: int, window: int, tail: int) -> None:
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    sparse = (i >= sink + window + 1) & (i < length - tail)
    expected = (j <= i) & (~sparse | (j < sink) | (j >= i - window))
    pattern = TrianglePattern.from_vllm_ascend(sink, window, tail)
    assert (keep_mask(length, pattern) == expected).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 512, 128), "num_sink_tokens is -1"),
        ((8, 0, 128), "sliding_window_size is 0"),
        ((8, -2, 128), "sliding_window_size is -2"),
        ((8, 512, 0), "num_last_tokens is 0"),
        ((8, 512.0, 128), "sliding_window_size is 512.0, but must be a whole number"),
        ((2**63, 512, 128), "num_sink_tokens is 9223372036854775808, but must be at most"),
    ],
)
def test_values_out_of_range_are_refused(values: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TrianglePattern(*values)


def test_dense_pattern_keeps_everything() -> None:
    assert DENSE_PATTERN.exact_length is None
    assert (keep_mask(300, DENSE_PATTERN) == np.tri(300, dtype=bool)).all()
