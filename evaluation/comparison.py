"""Two runs on the same samples, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.outcome import ModelRun
from trianglemix.evaluation.run import Setup
from trianglemix.evaluation.statistics import (
    Interval,
    Ratio,
    paired_difference,
    paired_ratio,
    score_interval,
)


@dataclass(frozen=True)
class Row:
    """One task (or all together, `task` "all") of two models side by side.

    `ttft_ratio` is of pairs of answers; None where the models did not answer in turn.
    """

    task: str
    samples: int
    baseline: Interval
    candidate: Interval
    difference: Interval
    ttft_ratio: Ratio | None


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same samples; without a baseline, one run beside itself is not shown."""

    setup: Setup
    baseline: ModelRun | None
    candidate: ModelRun
    rows: Sequence[Row]


def compare(baseline: ModelRun, candidate: ModelRun, together: bool = True) -> list[Row]:
    """A row for each task and one for all, the candidate's scores minus the baseline's.

    `together`: each sample was asked of both before the next one, so that times can be compared.

    Raises:
        ConfigurationError: the two runs did not see the same samples.
    """
    samples = [
        [(o.task, o.seed, o.references, o.prompt_tokens) for o in run.outcomes]
        for run in (baseline, candidate)
    ]
    if samples[0] != samples[1]:
        raise ConfigurationError(
            f"{baseline.name} and {candidate.name} were not asked the same samples (do they have "
            "different tokenizers?); compare models of one family"
        )
    tasks = list(dict.fromkeys(o.task for o in baseline.outcomes))
    rows = [_row(task, task, (baseline, candidate), together) for task in tasks]
    if len(tasks) > 1:
        rows.append(_row("all", None, (baseline, candidate), together))
    return rows


def _row(name: str, task: str | None, runs: tuple[ModelRun, ModelRun], together: bool) -> Row:
    theirs, ours = (run.scores(task) for run in runs)
    before, after = (run.ttft_s(task) for run in runs)
    return Row(
        name,
        len(ours),
        score_interval(theirs),
        score_interval(ours),
        paired_difference(ours, theirs),
        paired_ratio(after, before) if together else None,
    )
