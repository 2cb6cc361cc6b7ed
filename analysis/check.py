"""The sensitivity check: a plan is tried on tasks before it is recommended.

Three answers to the same samples: dense, the plan, and a control, which makes the same number of
the *most* important layers triangle layers. A check that cannot tell the control from dense says
nothing about the plan either, and is reported as blind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from trianglemix.analysis.errors import AnalysisError
from trianglemix.evaluation.statistics import Interval, paired_difference, score_interval

Scorer = Callable[[Sequence[int]], list[float]]
"""Scores (0 to 1), always of the same samples, with these layers as triangle layers."""
Verdict = Literal["accepted", "rejected", "blind"]


@dataclass(frozen=True)
class Trial:
    """What one set of layers scored, and by how much that differs from dense."""

    layers: tuple[int, ...]
    score: Interval
    difference: Interval


@dataclass(frozen=True)
class Check:
    """`verdict` is about the largest set tried that loses at most `allowed_loss`; scores 0 to 1."""

    samples: int
    allowed_loss: float
    dense: Interval
    trials: tuple[Trial, ...]
    control: Trial
    verdict: Verdict
    layers: tuple[int, ...]


def check_plan(
    plans: Sequence[Sequence[int]], ranked: Sequence[int], score: Scorer, allowed_loss: float
) -> Check:
    """Tries sets of layers, the largest first, until one is good enough.

    Good enough: the mean over the samples is at most `allowed_loss` (0.02 = two points) below
    dense. Accepted only if the control (as many of the last layers of `ranked`, the most important
    ones) loses more than the plan, and its interval excludes no loss at all.

    Raises:
        AnalysisError: nothing to try, or an empty set of layers.
    """
    if not plans or not all(plans):
        raise AnalysisError("the check was given no layers to try; name at least one")
    dense = score(())
    trials: list[Trial] = []
    for layers in sorted(plans, key=len, reverse=True):
        trials.append(_try(layers, score, dense))
        if trials[-1].difference.mean >= -allowed_loss:
            break
    best = trials[-1]
    control = _try(ranked[-len(best.layers) :], score, dense)
    good = best.difference.mean >= -allowed_loss
    seen = control.difference.high < 0 and control.difference.mean < best.difference.mean
    verdict: Verdict = "rejected" if not good else "accepted" if seen else "blind"
    layers = best.layers if good else ()
    return Check(
        len(dense), allowed_loss, score_interval(dense), tuple(trials), control, verdict, layers
    )


def _try(layers: Sequence[int], score: Scorer, dense: Sequence[float]) -> Trial:
    scores = score(layers)
    return Trial(tuple(sorted(layers)), score_interval(scores), paired_difference(scores, dense))
