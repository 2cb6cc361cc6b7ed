"""Where the rows of a batch lie: which tokens are real, and where each prompt ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from trianglemix.custom_ops.errors import ConfigurationError

_PROMPT_LENGTH: Final[ContextVar[tuple[int, ...] | None]] = ContextVar(
    "trianglemix_prompt_length", default=None
)


@dataclass(frozen=True)
class Rows:
    """One call's rows: new row `s` of batch row `b` has position `start + s`, pads included.

    `first_valid[b]` is the row's first real token, `prompt_length[b]` is `N` of the formula; both
    in buffer coordinates. `window` is the sliding window that the model's mask asks for (None:
    causal); `unknown` names a mask that is neither of the two.
    """

    start: int
    first_valid: tuple[int, ...]
    prompt_length: tuple[int, ...]
    window: int | None = None
    unknown: str | None = None

    # transformers carries it where it expects a mask, and touches these two on the way.
    ndim: ClassVar[int] = 0

    def contiguous(self) -> Rows:
        """Itself."""
        return self

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """Batch rows that share `(first_valid, prompt_length)`, and so share every mask."""
        groups: dict[tuple[int, int], list[int]] = {}
        for b, key in enumerate(zip(self.first_valid, self.prompt_length, strict=True)):
            groups.setdefault(key, []).append(b)
        return groups

    def shifted(self, offset: int) -> Rows:
        """The same rows when the first `offset` key slots are no longer in the buffer."""
        return replace(
            self,
            start=self.start - offset,
            first_valid=tuple(max(0, first - offset) for first in self.first_valid),
            prompt_length=tuple(length - offset for length in self.prompt_length),
        )


@contextmanager
def prompt_length(lengths: int | Sequence[int]) -> Iterator[None]:
    """Says, around calls that prefill by hand in chunks, where each prompt ends.

    `lengths` are tokens of the whole prompt, left pads included: one number for the batch or one
    for each row. `generate` of a patched model does it by itself.
    """
    value = (lengths,) if isinstance(lengths, int) else tuple(int(x) for x in lengths)
    token = _PROMPT_LENGTH.set(value)
    try:
        yield
    finally:
        _PROMPT_LENGTH.reset(token)


def rows_of_padding(padding: Tensor | None, batch: int, start: int, total: int) -> Rows:
    """Reads the rows from a `[B, >= total]` padding mask (1 = real token; None = all real).

    A row without a real token so far counts as all pads.

    Raises:
        ConfigurationError: pads between real tokens of a row, or prompt lengths for another batch.
    """
    first, ends = (0,) * batch, (total,) * batch
    if padding is not None:
        first, ends = _valid_ranges(padding[:, :total])
    declared = _PROMPT_LENGTH.get()
    if declared is None:
        return Rows(start, first, ends)
    if len(declared) not in (1, batch):
        raise ConfigurationError(
            f"prompt_length() was given {len(declared)} lengths, but the batch has {batch} rows"
        )
    lengths = declared * batch if len(declared) == 1 else declared
    if padding is not None:  # a row that is padded on the right ends before the longest row does
        lengths = tuple(
            end if end < total else length for end, length in zip(ends, lengths, strict=True)
        )
    return Rows(start, first, lengths)


def _valid_ranges(padding: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and end position of the real tokens of each row; one transfer from the device."""
    real = padding.to(torch.int64)
    position = torch.arange(real.shape[1], device=real.device)
    counts = real.sum(1)
    first = torch.where(counts > 0, real.argmax(1), real.shape[1])
    end = torch.where(counts > 0, (real * (position + 1)).amax(1), real.shape[1])
    rows: list[list[Any]] = torch.stack([first, end, counts]).tolist()
    for b, (a, e, n) in enumerate(zip(*rows, strict=True)):
        if n and e - a != n:
            raise ConfigurationError(
                f"the attention mask of batch row {b} has pads between real tokens "
                f"({n} real tokens in positions {a} to {e - 1}); pad at one end only"
            )
    return tuple(rows[0]), tuple(rows[1])
