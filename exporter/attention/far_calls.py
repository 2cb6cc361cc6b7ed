"""At which lengths a mask is looked at: single rows over long pasts, doubling, and near numbers.

A row costs O(T), so a graph with a cache is seen up to its context, a graph without one, whose
rows cost O(S * T), up to `SQUARE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trianglemix.exporter.attention.attention_probe import CallSizes

FARTHEST: Final = 1 << 17
"""Tokens up to which a graph with a cache is looked at that does not say its context."""
SQUARE: Final = 4096
_SHORTEST: Final = 41
_GROWTH: Final = 1.87  # of no power's kin, so that no row stands at the end of a chunk each time
_ROWS: Final = 3
_PADS: Final = 2
_MOST_NUMBERS: Final = 12
_PACKED: Final = (16, 700)
_PROMPTS: Final = (67, 179, 499, 1031, 2063)


def row_totals(limit: int) -> list[int]:
    """Totals `T`, ascending, that about double up to `limit`, which is the last."""
    totals, total = [], float(_SHORTEST)
    while total < limit:
        totals.append(int(total))
        total *= _GROWTH
    return [*totals, limit]


def rows_at(total: int) -> list[CallSizes]:
    """Three rows that end at `total`, of two sequences, one of them padded on the left."""
    rows = min(_ROWS, total - 1)
    pads = _PADS if total < 2 * SQUARE else total // 3
    return [CallSizes(2, rows, total - rows, pads=min(pads, total - rows - 1))]


def rows_near(number: int, limit: int) -> list[CallSizes]:
    """Rows and totals just below, at, and above a number that stands in the piece."""
    calls = [
        CallSizes(2, 3, number - 2, pads=1),  # rows number - 2 to number
        CallSizes(1, 1, number - 1),
        CallSizes(1, 1, number),
        CallSizes(1, 2, number + 1),
        CallSizes(1, 1, 2 * number + 1),
    ]
    return [call for call in calls if call.past > call.pads and call.total <= limit]


def prompts(window: int | None, numbers: Iterable[int], limit: int) -> list[CallSizes]:
    """Whole prompts without a past: padded on the left, on the right, and longer and longer.

    How many tokens are new may decide as well, so that `numbers` count for these lengths too.
    """
    calls = [CallSizes(2, 11, 0, pads=3), CallSizes(2, 13, 0, right_pads=4)]
    if window is not None and window <= 512:
        calls.append(CallSizes(2, window + 9, 0, pads=2))
    near = [number + 1 for number in numbers if number < _PROMPTS[-1]]
    calls += [CallSizes(1, length, 0) for length in sorted({*_PROMPTS, *near})]
    return [call for call in calls if call.total <= limit]


def tokens(window: int | None, limit: int) -> list[CallSizes]:
    """Many rows just beyond a window, so that every token that a mask may name is among them."""
    rows = 256
    total = min(limit, (window or 0) + 2 * rows)
    return [CallSizes(1, rows, total - rows)] if total > rows else []


def squares(limit: int, numbers: Iterable[int]) -> list[CallSizes]:
    """Prompts for a graph without a cache, ascending; the last has `limit` tokens."""
    near = sorted({number + 3 for number in numbers if number + 3 <= min(limit, SQUARE // 2)})
    totals = sorted({29, 83, 261, 811, 1543, limit, *near[:4]})
    calls = [CallSizes(2, total, 0, pads=_PADS if total in near else 0) for total in totals
             if total < SQUARE // 2]  # fmt: skip
    calls += [CallSizes(1, total, 0) for total in totals if total >= SQUARE // 2]
    padded = [CallSizes(2, 31, 0, pads=5), CallSizes(2, 37, 0, right_pads=6)]
    return [call for call in [*padded, *calls] if call.total <= limit]


def packed(window: int | None, limit: int, *, has_past: bool) -> list[CallSizes]:
    """Calls whose tokens may belong to two documents; from the last row a window reaches all.

    Sums over attention_mask may count a token twice there, so that half a window is kept to.
    """
    most = limit if window is None else min(window, max(2, (window - 1) // 2))
    totals = sorted({min(most, total) for total in _PACKED})
    calls = [CallSizes(1, total, 0) for total in totals]
    if has_past:
        calls += [CallSizes(1, 2, total - 2) for total in totals if total > 2]
    return [call for call in calls if call.half]


def chosen_numbers(numbers: Iterable[int], limit: int) -> list[int]:
    """Those that lengths may be compared with; of many, the smallest and the largest."""
    fitting = sorted(number for number in numbers if 2 < number <= limit)
    if len(fitting) <= _MOST_NUMBERS:
        return fitting
    half = _MOST_NUMBERS // 2
    return [*fitting[:half], *fitting[-half:]]
