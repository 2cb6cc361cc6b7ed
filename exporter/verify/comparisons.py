"""How close `--verify` wants logits to be, and what it feeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.manifest.feeds import Call, call_feeds, carry, empty_carried
from trianglemix.manifest.interface import fixed_length, fixed_past, fixed_total
from trianglemix.manifest.manifest import Manifest

_MATRIX: Final = 2
_RELATIVE: Final = {
    "float32": 1e-4, "unrounded": 5e-4, "float16": 2e-2, "int8": 5e-2, "bfloat16": 1e-1,
    "rounded": 2.0,
}  # fmt: skip
"""Of the largest logit, by the coarsest type that numbers are rounded to on the way.

Activations rounded to 8 bits by their own range leave no room for a tolerance: right exports were
off by all that there is, exports with a window off by one by 1.4e-2 (docs/experiments.md, "Rounded
activations"). So "rounded" only says that such files run and give numbers; faults are looked for
without the rounding. "unrounded": float32 numbers over weights of 8 bits and less.
"""
_SPECIAL_SHARE: Final = 0.12


@dataclass(frozen=True)
class Checks:
    """Comparisons on random prompts; `manifest` names the source's inputs and outputs.

    `dtype` is the coarsest type that the source rounds to, which says how close they must be.
    `special_ids` are strewn into the prompts.
    """

    manifest: Manifest
    vocabulary: int
    atol: float | None
    dtype: str
    special_ids: tuple[int, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether all calls have the same number of tokens, or the cache a fixed length."""
        inputs = self.manifest.inputs
        return bool(fixed_length(inputs) or fixed_past(inputs) or fixed_total(inputs))

    def ids(self, batch: int, length: int) -> Array:
        """Random tokens `[B, length]`, the same for a length each time."""
        random = np.random.default_rng(length)
        ids = random.integers(0, self.vocabulary, (batch, length))
        if not self.special_ids:
            return ids
        special = random.choice(np.array(self.special_ids, np.int64), ids.shape)
        return np.where(random.random(ids.shape) < _SPECIAL_SHARE, special, ids)

    def feeds(self, ids: Array, mask: Array, prompt_end: int | None = None) -> dict[str, Array]:
        """A call over an empty cache; `mask` `[B, T]` ends with the columns of `ids` `[B, S]`.

        A cache whose length is fixed holds zeros, which the mask hides.
        """
        inputs = self.manifest.inputs
        hidden = np.zeros((len(ids), fixed_past(inputs) or 0), np.int64)
        mask = np.concatenate([hidden, mask], axis=1)
        call = Call(ids, mask, prompt_end=prompt_end)
        return call_feeds(inputs, call) | empty_carried(inputs, len(ids))

    def carried(self, feeds: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        """The caches and states of the next call, from one call's feeds and outputs."""
        return carry(self.manifest.inputs, feeds, outputs)

    def logits(self, outputs: dict[str, Array]) -> Array:
        """`[B, S, vocabulary]`, `[B, 1, vocabulary]` where the graph gives a row of each text."""
        logits = outputs[self.manifest.logits]
        return logits[:, None] if logits.ndim == _MATRIX else logits

    def compare(
        self, name: str, tokens: int, ours: dict[str, Array], theirs: dict[str, Array]
    ) -> VerifyReport:
        """Logits of the last position (real in every row) of both."""
        a, b = (self.logits(x)[:, -1] for x in (ours, theirs))
        return self.judge(name, tokens, [(a, b)])

    def judge(self, name: str, tokens: int, pairs: list[tuple[Array, Array]]) -> VerifyReport:
        """Logits of ours and theirs, part by part."""
        error = max(_error(ours, theirs) for ours, theirs in pairs)
        largest = max(float(np.abs(theirs.astype(np.float64)).max()) for _, theirs in pairs)
        tolerance = _RELATIVE[self.dtype] * largest if self.atol is None else self.atol
        return VerifyReport(name, tokens, error, tolerance, error <= tolerance)


def check_passed(checks: list[VerifyReport]) -> None:
    """Raises ExportError where a comparison fails: the export is then not kept."""
    for check in checks:
        if not check.passed:
            raise ExportError(
                f"verification failed: {check.name} ({check.tokens} tokens) is off by "
                f"{check.max_error:.2e}, allowed {check.tolerance:.2e}; nothing was written"
            )


def _error(ours: Array, theirs: Array) -> float:
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
