"""The texts of `--verify`: how long, in which calls, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.exporter.verify.comparisons import Checks
from trianglemix.exporter.verify.session import OpenModel

_FEWEST: Final = 2
_KEPT: Final = 1 << 24  # logits of a text that are kept to be compared
_SHARES: Final = (0.41, 1, 0.23, 5, 0.37, 17)  # of a text, or tokens: the sizes of its chunks


@dataclass(frozen=True)
class Text:
    """Tokens `[B, T]` read in calls that end at `ends`; the prompt's end is `prompt`.

    `mask` `[B, T]` is 0 at pads.
    """

    name: str
    ids: Array
    mask: Array
    ends: tuple[int, ...]
    prompt: int

    @property
    def total(self) -> int:
        """`T` of the last call."""
        return self.ends[-1]


@dataclass(frozen=True)
class Reading:
    """Logits of each call, `[rows, some of the vocabulary]`, and which rows those are.

    `text` is as far as it was read; `trouble` is why it was not read further; of the vocabulary
    every `stride`-th number is kept.
    """

    text: Text
    logits: tuple[Array, ...]
    stride: int
    trouble: str | None = None


class OneTokenError(ExportError):
    """A model that takes one token at a time behind a past."""


def chunk_ends(prompt: int, most: int) -> tuple[int, ...]:
    """Ends of uneven chunks of a prompt, none of which has more than `most` tokens."""
    ends: list[int] = []
    end = turn = 0
    while end < prompt:
        share = _SHARES[turn % len(_SHARES)]
        size = int(share * prompt) if share < 1 else int(share)
        end = min(prompt, end + max(1, min(size, most)))
        ends.append(end)
        turn += 1
    return tuple(ends)


def read(model: OpenModel, checks: Checks, text: Text) -> Reading:
    """All calls of a text, each over the cache of those before.

    Raises:
        ExportError: a call does not run.
    """
    reader = _Reader(model, checks, text, is_source=False)
    for end in text.ends:
        reader.step(end)
    return reader.reading(None)


def read_source(model: OpenModel, checks: Checks, text: Text) -> Reading:
    """As `read`, but as far as the source runs, which is searched for.

    Raises:
        OneTokenError: it takes no second token behind a past.
        ExportError: it does not run two tokens.
    """
    reader = _Reader(model, checks, text, is_source=True)
    for end in text.ends:
        try:
            reader.step(end)
        except ExportError as error:
            reached = _search(reader, end)
            if reader.end and end - reader.end > 1 and reached <= reader.end + 1:
                raise OneTokenError(str(error)) from error
            if reached < _FEWEST:
                raise
            if reached > reader.end:
                reader.step(reached)
            return reader.reading(str(error))
    return reader.reading(None)


def compare_readings(checks: Checks, ours: Reading, theirs: Reading) -> list[VerifyReport]:
    """Reports of the prompt's calls and of the decode steps behind it."""
    text = theirs.text
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    prompts = [pair for pair, end in zip(pairs, text.ends, strict=True) if end <= text.prompt]
    steps = pairs[len(prompts) :]
    reports = [checks.judge(text.name, min(text.prompt, text.total), _alike(prompts))]
    if steps:
        name = f"decode steps after the {text.name}"
        reports.append(checks.judge(name, text.total, _alike(steps)))
    return reports


def _alike(pairs: Iterable[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """Where one gives the last position's logits only, the other's last position."""
    same = []
    for ours, theirs in pairs:
        length = min(ours.shape[1], theirs.shape[1])
        same.append((ours[:, -length:], theirs[:, -length:]))
    return same


def _search(reader: _Reader, end: int) -> int:
    """The furthest end at which the next call runs; the reader's own where none does."""
    runs, fails = reader.end, end
    while fails - runs > 1:
        middle = (runs + fails) // 2
        if reader.can_step(middle):
            runs = middle
        else:
            fails = middle
    return runs


class _Reader:
    """A text on its way through a model."""

    def __init__(self, model: OpenModel, checks: Checks, text: Text, *, is_source: bool) -> None:
        self._model, self._checks, self._text = model, checks, text
        self._is_source = is_source
        self._carried: dict[str, Array] = {}
        self._logits: list[Array] = []
        self._ends: list[int] = []
        batch, rows = len(text.ids), text.total
        self._stride = max(1, -(-batch * rows * checks.vocabulary // _KEPT))

    @property
    def end(self) -> int:
        """Where the last call ended."""
        return self._ends[-1] if self._ends else 0

    def can_step(self, end: int) -> bool:
        """Whether the next call may end there; it is not kept."""
        try:
            self._call(end)
        except ExportError:
            return False
        return True

    def step(self, end: int) -> None:
        """The next call. Raises ExportError where it does not run or gives no numbers."""
        feeds, outputs, logits = self._call(end)
        if end < self._text.total:
            self._carried = self._checks.carried(feeds, outputs)
        self._logits.append(logits)
        self._ends.append(end)

    def reading(self, trouble: str | None) -> Reading:
        """What was read."""
        text = replace(self._text, ends=tuple(self._ends))
        return Reading(text, tuple(self._logits), self._stride, trouble)

    def _call(self, end: int) -> tuple[dict[str, Array], dict[str, Array], Array]:
        text, checks = self._text, self._checks
        ids, mask = text.ids[:, self.end : end], text.mask[:, :end]
        feeds = {**checks.feeds(ids, mask, min(text.prompt, text.total)), **self._carried}
        outputs = self._model.run(feeds)
        logits = checks.logits(outputs)[..., :: self._stride].astype(np.float32)
        real = mask[:, -logits.shape[1] :] != 0
        logits = np.where(real[..., None], logits, 0)
        if self._is_source and not np.isfinite(logits).all():
            raise ExportError(f"verification: the model's logits of {end} tokens are not numbers")
        return feeds, outputs, logits
