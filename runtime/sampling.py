"""The choice of the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.arrays import FloatArray
from trianglemix.runtime.errors import PromptError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most likely one (greedy).

    Otherwise a token is drawn from the `top_k` most likely (0: all), cut further to the smallest
    set that holds `top_p` of the probability. Row `r` of a batch draws with `seed + r`; without a
    seed every run differs.

    Raises:
        PromptError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < np.inf:
            raise PromptError(
                f"temperature is {self.temperature}, but must be a finite number, 0 or more"
            )
        if self.top_k < 0:
            raise PromptError(f"top_k is {self.top_k}, but must be 0 (off) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise PromptError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise PromptError(f"seed is {self.seed}, but must be 0 or more")


GREEDY = Sampling()


class Sampler:
    """Chooses tokens row by row; each row has its own random numbers."""

    def __init__(self, sampling: Sampling, rows: range) -> None:
        self._sampling = sampling
        seed = sampling.seed
        self._random = [np.random.default_rng(None if seed is None else seed + row) for row in rows]

    def choose(self, logits: FloatArray) -> NDArray[np.int64]:
        """`[B]` token ids from logits `[B, vocabulary]`."""
        if self._sampling.temperature == 0.0:
            likeliest: NDArray[np.int64] = np.argmax(logits, axis=-1).astype(np.int64)
            return likeliest
        chosen = [self._draw(row, random) for row, random in zip(logits, self._random, strict=True)]
        return np.array(chosen, np.int64)

    def _draw(self, logits: FloatArray, random: np.random.Generator) -> int:
        settings = self._sampling
        if 0 < settings.top_k < len(logits):
            candidates = np.argpartition(logits, -settings.top_k)[-settings.top_k :]
        else:
            candidates = np.arange(len(logits))
        candidates = candidates[np.argsort(-logits[candidates], kind="stable")]
        scores = logits[candidates].astype(np.float64) / settings.temperature
        cumulative = np.cumsum(np.exp(scores - scores[0]))
        cumulative /= cumulative[-1]
        kept = 1 + int(np.searchsorted(cumulative, settings.top_p))  # the first to reach top_p
        kept = min(kept, len(cumulative))
        point = random.random() * cumulative[kept - 1]
        place = int(np.searchsorted(cumulative[:kept], point, side="right"))
        return int(candidates[min(place, kept - 1)])
