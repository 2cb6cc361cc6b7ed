"""Finds the class of a mask by looking at its rows, near and far, and at what scores become.

Whoever has a mask gives a `MaskRows`; here it is asked at the lengths of `far_calls`, and all it
answers must be one class: causal, or causal with one sliding window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.exporter.attention import far_calls
from trianglemix.exporter.attention.attention_probe import CallSizes
from trianglemix.exporter.attention.cutout import CutError, CutRunError
from trianglemix.exporter.attention.packed_documents import check_documents
from trianglemix.exporter.attention.sites import AttentionSite, MaskClass

_SPIKES: Final = (2.0, -3.0, 9.0)
_SAME_RATIO: Final = 3e-3


class MaskRows(Protocol):
    """A mask that can be asked."""

    @property
    def has_past(self) -> bool: ...

    @property
    def grows_square(self) -> bool:
        """Whether a single row makes something of `T * T` elements."""

    @property
    def numbers(self) -> set[int]:
        """Whole numbers that stand in it."""

    @property
    def by_content(self) -> str | None:
        """The input of the graph besides attention_mask and positions that it reads, if any."""

    def visible(self, sizes: CallSizes) -> BoolArray:
        """Which keys equal scores give weight to, `[B, H, S, T]` or what broadcasts to it.

        Raises:
            CutError: it does not run at these sizes, or weights are not equal.
        """

    def weights(self, sizes: CallSizes, scores: Array) -> Array | None:
        """Weights for scores `[S, T]` of every head, like `visible`; None where it makes none."""


def bounded_context(context_length: int | None, sites: Iterable[AttentionSite]) -> int | None:
    """The context (tokens), or less where a mask was not seen so far: it runs no further, or its
    rows cost too much to look beyond."""
    seen = [site.mask.seen_to for site in sites if site.mask.seen_to is not None]
    least = min(seen, default=far_calls.FARTHEST)
    if least >= min(context_length or far_calls.FARTHEST, far_calls.FARTHEST):
        return context_length
    return least


def bound_note(context_length: int | None, sites: Iterable[AttentionSite]) -> list[str]:
    """Says so where the context is bounded."""
    bound = bounded_context(context_length, sites)
    if bound == context_length:
        return []
    return [
        f"its masks could be looked at up to {bound} tokens only (there they end, or cost too "
        "much): longer texts are refused"
    ]


def measure_class(rows: MaskRows, context_length: int | None) -> MaskClass:
    """Causal, or causal with a sliding window, as every row that was looked at has it.

    Raises:
        CutError: neither; the message names the first position where it differs.
    """
    limit = min(context_length or far_calls.FARTHEST, far_calls.FARTHEST)
    if not rows.has_past or rows.grows_square:
        limit = min(limit, far_calls.SQUARE)
    numbers = far_calls.chosen_numbers(rows.numbers, limit)
    if rows.has_past:
        seen_to, window = _widest(rows, limit)
        calls = [
            call for total in far_calls.row_totals(seen_to) for call in far_calls.rows_at(total)
        ]
        for number in sorted({*numbers, *([window] if window else [])}):
            calls += far_calls.rows_near(number, seen_to)
        calls += far_calls.prompts(window, numbers, seen_to)
        if rows.by_content is not None:
            calls += far_calls.tokens(window, seen_to)
    else:
        seen_to, window, calls = _widest_square(rows, limit, numbers)
    check = _Check(rows, window)
    for call in sorted(calls, key=lambda call: call.total):
        check.agrees(call)
    check_documents(rows.visible, far_calls.packed(window, seen_to, has_past=rows.has_past))
    return MaskClass(window, seen_to)


def real_rows(sizes: CallSizes) -> BoolArray:
    """`[B, 1, S, 1]`: rows that are no padding, which may see anything."""
    i = np.arange(sizes.past, sizes.total)[None]
    real: BoolArray = (i >= sizes.first_valid()[:, None]) & (i < sizes.row_end()[:, None])
    return real[:, None, :, None]


def _widest(rows: MaskRows, limit: int) -> tuple[int, int | None]:
    """The longest total at which a row runs, and how many keys it sees if not all.

    Raises:
        CutError: not even a short one runs.
    """
    seen_to, window, beyond = 0, None, limit + 1
    for total in far_calls.row_totals(limit):
        try:
            window = _window_at(rows, total)
        except CutRunError:
            if not seen_to:
                raise
            beyond = total
            break
        seen_to = total
    while beyond - seen_to > 1:  # where its tables end, to the token
        middle = (seen_to + beyond) // 2
        try:
            seen_to, window = middle, _window_at(rows, middle)
        except CutRunError:
            beyond = middle
    return seen_to, window


def _window_at(rows: MaskRows, total: int) -> int | None:
    return _seen_keys(rows.visible(CallSizes(1, 1, total - 1)), total)


def _widest_square(
    rows: MaskRows, limit: int, numbers: list[int]
) -> tuple[int, int | None, list[CallSizes]]:
    """As `_widest`, with the prompts that run."""
    seen_to, window, calls = 0, None, []
    for call in far_calls.squares(limit, numbers):
        try:
            visible = rows.visible(call)
        except CutRunError:
            if not seen_to:
                raise
            continue
        calls.append(call)
        if call.total > seen_to:
            seen_to, window = call.total, _seen_keys(visible, call.total)
    return seen_to, window, calls


def _seen_keys(visible: BoolArray, total: int) -> int | None:
    """Keys that the last row sees; None if all.

    Raises:
        CutError: it sees none.
    """
    row = np.broadcast_to(visible, (*visible.shape[:-1], total))[0, 0, -1]
    seen = int(row.sum())
    if seen == 0:
        raise CutError(f"its mask hides every key from the last of {total} tokens")
    return None if seen == total else seen


@dataclass(frozen=True)
class Expected:
    """The rows of a causal mask, or of one with a sliding window."""

    window: int | None
    reads: str | None = None  # what else the mask is made of, for the message

    def check(self, visible: BoolArray, sizes: CallSizes) -> None:
        """Raises CutError with the first position at which `visible` `[B, H, S, T]` differs."""
        i, j = np.arange(sizes.past, sizes.total)[:, None], np.arange(sizes.total)[None]
        expected = (j <= i)[None] & (j[None] >= sizes.first_valid()[:, None, None])
        if self.window is not None:
            expected &= (i - j < self.window)[None]
        differs = (visible != expected[:, None]) & real_rows(sizes)
        if not differs.any():
            return
        b, h, row, key = (int(x) for x in np.argwhere(differs)[0])
        if key < int(sizes.first_valid()[b]) or key >= int(sizes.row_end()[b]):
            raise CutError(
                f"its mask shows padding: attention_mask hides key {key} of {sizes.total} tokens, "
                f"and row {sizes.past + row} sees it (head {h}, batch row {b})"
            )
        kind = "causal" if self.window is None else f"a sliding window of {self.window}"
        verb = "does not see" if expected[b, row, key] else "sees"
        why = f"; it reads {self.reads}" if self.reads else ""
        pads = int(sizes.first_valid()[b])
        where = f"head {h}, batch row {b}" + (f", {pads} pads on its left" if pads else "")
        raise CutError(
            f"its mask is neither causal nor a sliding window{why}: taken for {kind}, row "
            f"{sizes.past + row} of {sizes.total} tokens {verb} key {key} ({where})"
        )


@dataclass
class _Check:
    """Holds every call to one window, and to one way of turning scores into weights."""

    rows: MaskRows
    window: int | None
    ratios: dict[float, float] = field(default_factory=dict)  # log of its weight over a zero's

    def agrees(self, sizes: CallSizes) -> None:
        """Raises CutError with the first position at which a call differs."""
        Expected(self.window, self.rows.by_content).check(self.rows.visible(sizes), sizes)
        self._same_ratios(sizes)

    def _same_ratios(self, sizes: CallSizes) -> None:
        """The same scores must weigh the same against each other at every length.

        Raises:
            CutError: a scale or a bias that changes with the length or the position.
        """
        row = sizes.length - 1
        position = sizes.past + row
        first = 0 if self.window is None else max(0, position - self.window + 1)
        keys = list(dict.fromkeys(k for k in (position, first, position - 1, position - 2)
                                  if k >= first))  # fmt: skip
        spikes = dict(zip(_SPIKES, keys[:-1], strict=False))
        if not spikes or sizes.right_pads:
            return
        scores = np.zeros((sizes.length, sizes.total), np.float32)
        scores[row, list(spikes.values())] = list(spikes)
        weights = self.rows.weights(sizes, scores)
        if weights is None:
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(weights[0, :, row].astype(np.float64))
        for score, key in spikes.items():
            ratio = logs[:, key] - logs[:, keys[-1]]
            wanted = self.ratios.setdefault(score, float(ratio[0]))
            if not np.all(np.abs(ratio - wanted) <= _SAME_RATIO * max(1.0, abs(wanted))):
                raise CutError(
                    "what its scores are scaled by, or what is added to them, changes with length "
                    f"or position: a score of {score:g} counts exp({wanted:.4g}) in a short text, "
                    f"and exp({float(ratio[0]):.4g}) at row {position} of {sizes.total} tokens"
                )
