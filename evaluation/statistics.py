"""Means and ratios with 95% intervals, of one model and of two on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, median
from typing import Final

_Z: Final = 1.959964  # 95%, two sides
_OUTSIDE: Final = 0.05
_HALVINGS: Final = 60


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """A median of ratios and its 95% interval; None where the pairs are too few to have one."""

    median: float
    low: float | None
    high: float | None


def score_interval(scores: Sequence[float]) -> Interval:
    """Mean of scores from 0 to 1 with Wilson's interval, which is honest at 0 and 1 as well."""
    n, p = len(scores), fmean(scores)
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of `scores - baseline` over the same samples, with Tango's score interval for pairs.

    The interval holds the differences that a score test does not reject (T. Tango, Statistics in
    Medicine 17, 891-908, 1998), so that no difference in 20 pairs is -16 to +16 points and not
    nothing. Pairing takes out how hard each sample is. Scores between 0 and 1 count by their part:
    the variance of such differences is at most that of whole ones with the same gains and losses,
    so their interval is never too narrow, and may be too wide.
    """
    if len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(baseline)}")
    differences = [ours - theirs for ours, theirs in zip(scores, baseline, strict=True)]
    gained = sum(d for d in differences if d > 0)
    lost = -sum(d for d in differences if d < 0)
    n = len(differences)
    mean = (gained - lost) / n

    def rejected(delta: float) -> bool:
        return abs(_tango_score(gained, lost, n, delta)) > _Z

    return Interval(mean, _edge(mean, -1.0, rejected), _edge(mean, 1.0, rejected))


def _tango_score(gained: float, lost: float, n: int, delta: float) -> float:
    """The statistic of the hypothesis that the true difference is `delta`, standard normal.

    `q` is the likeliest chance of a loss if it is: the larger root of `a q^2 + b q + c`.
    """
    a, b = 2 * n, (2 * n - gained + lost) * delta - gained - lost
    c = -lost * delta * (1 - delta)
    q = (sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    off = gained - lost - n * delta
    return off / sqrt(variance) if variance > 0 else off * float("inf") if off else 0.0


def _edge(inside: float, outside: float, rejected: Callable[[float], bool]) -> float:
    """Where the values that are not rejected end, on the way from `inside` to `outside`."""
    if not rejected(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return (inside + outside) / 2


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Median of `values / baseline` over the same samples, with the sign test's interval.

    Its ends are two of the sorted ratios, and hold the true median with a chance of at least 95%
    whatever the distribution (W. J. Conover, Practical Nonparametric Statistics, on quantiles): one
    slow answer moves nothing. Five pairs or fewer have no such interval.
    """
    ratios = sorted(ours / theirs for ours, theirs in zip(values, baseline, strict=True))
    n = len(ratios)
    below, outside = 0, 2.0 * 0.5**n  # the chance that the median is beyond the outermost ratios
    if outside > _OUTSIDE:
        return Ratio(median(ratios), None, None)
    while (wider := outside + 2 * comb(n, below + 1) * 0.5**n) <= _OUTSIDE:
        below, outside = below + 1, wider
    return Ratio(median(ratios), ratios[below], ratios[n - 1 - below])
