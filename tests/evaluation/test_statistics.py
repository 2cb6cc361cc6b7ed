"""Intervals: known values, pairing, and the comparison of two runs."""

from __future__ import annotations

import pytest
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.run import ModelRun, Outcome, compare
from trianglemix.evaluation.statistics import paired_difference, score_interval


def test_wilson_interval_of_known_values() -> None:
    """8 of 10: 0.490 to 0.943 (Wilson 1927, as in any table)."""
    interval = score_interval([1.0] * 8 + [0.0] * 2)
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.490, abs=1e-3)
    assert interval.high == pytest.approx(0.943, abs=1e-3)
    assert score_interval([1.0] * 20).low == pytest.approx(0.839, abs=1e-3)


def test_pairing_takes_out_the_difficulty_of_the_samples() -> None:
    hard_and_easy = [0.0] * 100 + [1.0] * 100
    same = paired_difference(hard_and_easy, hard_and_easy)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    worse = [0.0] * 120 + [1.0] * 80
    difference = paired_difference(worse, hard_and_easy)
    assert difference.mean == pytest.approx(-0.1)
    assert -0.15 < difference.low < -0.1 < difference.high < -0.05
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0], [1.0, 0.0])


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
    assert all(row.ttft_ratio == 0.5 for row in rows)
    with pytest.raises(ConfigurationError, match="same samples"):
        compare(dense, _run("other", {"a": [1, 1, 0, 0], "b": [1, 1, 1, 1]}, 1.0, tokens=8))
