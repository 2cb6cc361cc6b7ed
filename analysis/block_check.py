"""The check on tasks of block-sparse layers: the rule's blocks, and as many random ones.

Three answers to the same samples: the plan's triangle layers alone, these with the block-sparse
layers, and a control, in which each head keeps as many blocks but any. A check that cannot tell the
control from the plan says nothing about the rule, and is reported as blind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trianglemix.analysis.check import Trial, Verdict
from trianglemix.evaluation.statistics import Interval, paired_difference, score_interval

BlockKind = Literal["none", "rule", "random"]
BlockScorer = Callable[[BlockKind], list[float]]
"""Scores (0 to 1), always of the same samples: without the layers, by the rule, by chance."""


@dataclass(frozen=True)
class BlockCheck:
    """Differences are from the plan without block-sparse layers; scores 0 to 1."""

    samples: int
    allowed_loss: float
    plan: Interval
    rule: Trial
    control: Trial
    verdict: Verdict


def check_blocks(layers: tuple[int, ...], score: BlockScorer, allowed_loss: float) -> BlockCheck:
    """Accepted: the mean is at most `allowed_loss` below the plan alone, and the control is seen.

    Seen: the control loses more than the rule, and its interval excludes no loss at all.
    """
    plan = score("none")
    rule, control = (_trial(layers, score(kind), plan) for kind in ("rule", "random"))
    good = rule.difference.mean >= -allowed_loss
    seen = control.difference.high < 0 and control.difference.mean < rule.difference.mean
    verdict: Verdict = "rejected" if not good else "accepted" if seen else "blind"
    return BlockCheck(len(plan), allowed_loss, score_interval(plan), rule, control, verdict)


def _trial(layers: tuple[int, ...], scores: list[float], plan: list[float]) -> Trial:
    return Trial(layers, score_interval(scores), paired_difference(scores, plan))
