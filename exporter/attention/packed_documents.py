"""Masks that part documents packed into one row: by numbers in attention_mask, or by positions.

What a mask does with a 2 in attention_mask may be anything, where its users give it 0 and 1: it
may count as real, as a pad, or be worth a huge score. All that goes by what a *key's* number is. A
mask of documents compares it with the *row's*: keys of one number come and go with the row that
looks at them. Likewise positions that start again hide keys from rows in many a mask; only one of
documents tells two keys of one position apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from trianglemix.exporter.attention.attention_probe import CallSizes
from trianglemix.exporter.attention.cutout import CutError

_Visible = Callable[[CallSizes], NDArray[np.bool_]]


def check_documents(visible: _Visible, calls: Iterable[CallSizes]) -> None:
    """Asks the last row of each call, which sees all keys while there is one document.

    Raises:
        CutError: it does not where there are two; the message names the first key.
    """
    for call in calls:
        _check_numbers(visible, call)
        if not call.past:
            _check_positions(visible, call)


def _check_numbers(visible: _Visible, call: CallSizes) -> None:
    """A mask of documents is the plain one where all numbers are 2."""
    numbers = ((1, 1), (2, 2), (1, 2), (2, 1))
    try:
        plain, same, rising, falling = (visible(replace(call, segments=x)) for x in numbers)
    except CutError:  # such numbers are none that it takes
        return
    if not np.array_equal(plain, same):
        return
    half = call.half
    up, down = _last_row(rising, call), _last_row(falling, call)
    by_key = [np.array_equal(up[:, :half].all(1), down[:, half:].all(1)),
              np.array_equal(down[:, :half].all(1), up[:, half:].all(1))]  # fmt: skip
    if not all(by_key):
        first, second, seen = (2, 1, down) if up.all() else (1, 2, up)
        raise CutError(
            f"its mask parts documents by the numbers in attention_mask: with {first} for the "
            f"first {half} of {call.total} tokens and {second} for the others, row "
            f"{call.total - 1} does not see key {_first_hidden(seen)}"
        )


def _check_positions(visible: _Visible, call: CallSizes) -> None:
    try:
        seen = _last_row(visible(replace(call, restarts=True)), call)
    except CutError:
        return
    if (seen[:, call.half] & ~seen[:, 0]).any():
        raise CutError(
            "its mask parts documents by where positions start again: with a second start at "
            f"token {call.half} of {call.total}, row {call.total - 1} does not see key "
            f"{_first_hidden(seen)}"
        )


def _last_row(visible: NDArray[np.bool_], call: CallSizes) -> NDArray[np.bool_]:
    """`[H, T]`: keys that the last row sees."""
    return np.broadcast_to(visible, (*visible.shape[:-1], call.total))[0, :, -1]


def _first_hidden(seen: NDArray[np.bool_]) -> int:
    return int(np.argwhere(~seen)[0, 1])
