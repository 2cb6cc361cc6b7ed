"""Intervals: known values, how often they hold the truth, and the comparison of two runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from math import comb

import numpy as np
import pytest
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.comparison import compare
from trianglemix.evaluation.outcome import ModelRun, Outcome
from trianglemix.evaluation.statistics import (
    Interval,
    paired_difference,
    paired_ratio,
    score_interval,
)


def test_wilson_interval_of_known_values() -> None:
    """8 of 10: 0.490 to 0.943 (Wilson 1927, as in any table)."""
    interval = score_interval([1.0] * 8 + [0.0] * 2)
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.490, abs=1e-3)
    assert interval.high == pytest.approx(0.943, abs=1e-3)
    assert score_interval([1.0] * 20).low == pytest.approx(0.839, abs=1e-3)


def _difference(gained: int, lost: int, n: int) -> Interval:
    ours = [1.0] * gained + [0.0] * (n - gained)
    theirs = [0.0] * gained + [1.0] * lost + [0.0] * (n - gained - lost)
    return paired_difference(ours, theirs)


def test_tango_interval_of_known_values() -> None:
    """Without differing pairs it is z^2 / (n + z^2) to both sides; 1 and 7 of 21 pairs are the
    example of Fagerland, Lydersen and Laake (Statistics in Medicine 33, 2014): -0.517 to -0.026."""
    none = _difference(0, 0, 20)
    assert (none.mean, none.low, none.high) == pytest.approx((0, -0.1611, 0.1611), abs=1e-4)
    known = _difference(1, 7, 21)
    assert (known.low, known.high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    all_gained = _difference(20, 0, 20)
    assert all_gained.high == 1.0
    assert 0.6 < all_gained.low < 0.9
    one, other = _difference(3, 7, 40), _difference(7, 3, 40)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))


@cache
def _coverage(n: int, gains: float, losses: float) -> float:
    """How often the interval holds the truth: all outcomes of n pairs, each with its chance."""
    total = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            interval = _difference(gained, lost, n)
            if interval.low <= gains - losses <= interval.high:
                ways = comb(n, gained) * comb(n - gained, lost)
                rest = 1 - gains - losses
                total += ways * gains**gained * losses**lost * rest ** (n - gained - lost)
    return total


@pytest.mark.parametrize("n", [20, 40])
@pytest.mark.parametrize(
    ("gains", "losses"), [(0.0, 0.0), (0.01, 0.01), (0.02, 0.05), (0.1, 0.1), (0.0, 0.3)]
)
def test_the_difference_s_interval_holds_the_truth_as_often_as_it_says(
    n: int, gains: float, losses: float
) -> None:
    assert _coverage(n, gains, losses) >= 0.93


def test_scores_in_between_have_no_narrower_interval_than_their_variance_needs() -> None:
    random = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        ours, theirs = random.choice(
            [0, 0.25, 0.5, 0.75, 1.0], (2, 30), p=[0.1, 0.1, 0.2, 0.2, 0.4]
        )
        interval = paired_difference(ours.tolist(), theirs.tolist())
        held += interval.low <= 0 <= interval.high
    assert held >= 285


def test_pairing_takes_out_the_difficulty_of_the_samples() -> None:
    hard_and_easy = [0.0] * 100 + [1.0] * 100
    worse = [0.0] * 120 + [1.0] * 80
    difference = paired_difference(worse, hard_and_easy)
    assert difference.mean == pytest.approx(-0.1)
    assert -0.16 < difference.low < -0.1 < difference.high < -0.05
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0], [1.0, 0.0])


def test_the_ratio_is_of_pairs() -> None:
    """Each sample twice as fast, whatever the samples' own times; one slow answer moves nothing."""
    theirs = [1.0, 9.0, 2.0, 7.0, 3.0, 5.0, 4.0, 8.0]
    ratio = paired_ratio([x / 2 for x in theirs], theirs)
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    ratio = paired_ratio([x / 2 for x in theirs[:-1]] + [800.0], theirs)
    assert (ratio.median, ratio.high) == (0.5, 100.0), "of eight the outermost are the ends"
    assert paired_ratio([x / 2 for x in theirs] * 2, theirs * 2).median == 0.5
    few = paired_ratio([1.0] * 5, [2.0] * 5)
    assert (few.median, few.low, few.high) == (0.5, None, None)
    assert paired_ratio([1.0] * 6, [2.0] * 6).low == 0.5


@pytest.mark.parametrize("n", [6, 20, 45])
def test_the_ratio_s_interval_holds_the_truth_as_often_as_it_says(n: int) -> None:
    """Times with a heavy tail, as those of a busy machine have."""
    random = np.random.default_rng(n)
    held, trials = 0, 1000
    for _ in range(trials):
        theirs = np.exp(random.normal(0, 0.5, n))
        ours = 0.6 * theirs * np.exp(random.standard_t(2, n) * 0.1)
        ratio = paired_ratio(ours.tolist(), theirs.tolist())
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 0.6 <= ratio.high
    assert 0.935 <= held / trials <= 0.99


def _run(name: str, scores: dict[str, list[float]], seconds: float, tokens: int = 9) -> ModelRun:
    outcomes = [
        Outcome(task, seed, score, tokens, seconds, "", ("x",))
        for task, values in scores.items()
        for seed, score in enumerate(values)
    ]
    return ModelRun(name, {}, outcomes, None)


def test_rows_of_a_comparison() -> None:
    dense = _run("dense", {"a": [1, 1, 0, 0], "b": [1, 1, 1, 1]}, 2.0)
    triangle = _run("triangle", {"a": [1, 0, 0, 0], "b": [1, 1, 1, 1]}, 1.0)
    rows = compare(dense, triangle)
    assert [row.task for row in rows] == ["a", "b", "all"]
    assert [row.difference.mean for row in rows] == [-0.25, 0.0, -0.125]
    ratios = [row.ttft_ratio for row in rows if row.ttft_ratio]
    assert [ratio.median for ratio in ratios] == [0.5] * 3
    assert [ratio.low for ratio in ratios] == [None, None, 0.5], "four pairs, and eight"
    assert "NaN" not in json.dumps([asdict(row) for row in rows])
    apart = compare(dense, triangle, together=False)
    assert [row.ttft_ratio for row in apart] == [None] * 3, "times of other moments"
    with pytest.raises(ConfigurationError, match="same samples"):
        compare(dense, _run("other", {"a": [1, 1, 0, 0], "b": [1, 1, 1, 1]}, 1.0, tokens=8))
