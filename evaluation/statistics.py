"""Means with 95% intervals, of one model and of the difference of two on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np

_Z: Final = 1.959964  # 95%, two sides
_RESAMPLES: Final = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


def score_interval(scores: Sequence[float]) -> Interval:
    """Mean of scores from 0 to 1 with Wilson's interval, which is honest at 0 and 1 as well."""
    n, p = len(scores), float(np.mean(scores))
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of `scores - baseline` over the same samples, with the percentile bootstrap interval.

    Pairing takes out how hard each sample is. The resamples are seeded: the same scores give the
    same interval.
    """
    if len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(baseline)}")
    difference = np.asarray(scores) - np.asarray(baseline)
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(difference), (_RESAMPLES, len(difference)))
    means = difference[chosen].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(difference.mean()), float(low), float(high))
