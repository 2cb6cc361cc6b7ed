"""The predicate: which keys a row keeps. Everything else is tested against it."""

from __future__ import annotations

import numpy as np
from trianglemix.custom_ops.arrays import BoolArray, IntArray
from trianglemix.custom_ops.triangle.contract import TrianglePattern


def keep(
    row: IntArray | int,
    column: IntArray | int,
    pattern: TrianglePattern,
    prompt_length: int,
    first_valid: int = 0,
) -> BoolArray:
    """Whether query position `row` keeps key position `column` (0-based, broadcast).

    `keep(i, j) = first_valid <= j <= i and (j - first_valid < sink or i - j < window
    or i >= prompt_length - last)`; all positions in buffer coordinates, left pads included.
    """
    i, j = np.asarray(row, np.int64), np.asarray(column, np.int64)
    sink = j - first_valid < pattern.num_sink_tokens
    window = (i - j < pattern.sliding_window_size) | np.bool_(pattern.is_dense)
    last = i >= prompt_length - pattern.num_last_tokens
    return np.asarray((first_valid <= j) & (j <= i) & (sink | window | last))


def keep_mask(prompt_length: int, pattern: TrianglePattern, first_valid: int = 0) -> BoolArray:
    """`[N, N]` mask of a whole prompt of `prompt_length` tokens: for tests, pictures and probes."""
    position = np.arange(prompt_length)
    return keep(position[:, None], position[None, :], pattern, prompt_length, first_valid)


def kept_pairs(prompt_length: int, pattern: TrianglePattern) -> int:
    """Number of (row, key) pairs kept of a prompt of `prompt_length` tokens, in closed form."""
    causal = prompt_length * (prompt_length + 1) // 2
    if pattern.is_dense:
        return causal
    streaming = max(0, prompt_length - pattern.num_last_tokens)
    span = pattern.num_sink_tokens + pattern.sliding_window_size
    whole_prefix = min(streaming, span)  # rows so early that nothing is dropped yet
    last = causal - streaming * (streaming + 1) // 2
    return whole_prefix * (whole_prefix + 1) // 2 + (streaming - whole_prefix) * span + last


def key_intervals(
    first: int, last: int, pattern: TrianglePattern, prompt_length: int, first_valid: int = 0
) -> list[tuple[int, int]]:
    """Half-open, ascending, disjoint key intervals that rows `first .. last` keep between them.

    What a kernel visits. All of the rows are dense last rows, or none of them is.
    """
    if last < first_valid:
        return []
    sink_end = first_valid + pattern.num_sink_tokens
    window_start = first + 1 - pattern.sliding_window_size
    is_last = last >= prompt_length - pattern.num_last_tokens
    if pattern.is_dense or is_last or window_start <= sink_end:
        return [(first_valid, last + 1)]
    window = (window_start, last + 1)
    return [window] if sink_end == first_valid else [(first_valid, sink_end), window]
