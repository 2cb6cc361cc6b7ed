"""Runs tasks on models, one model at a time, every model on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.model import AnswerModel, Loader, encode_sample
from trianglemix.evaluation.prompts import fitted_prompt
from trianglemix.evaluation.statistics import Interval, paired_difference, score_interval
from trianglemix.evaluation.task import Task

Progress = Callable[[str], None]
"""Told the name of the model and task after every answer."""


@dataclass(frozen=True)
class Setup:
    """Which tasks, prompts of how many tokens (answer included), how many samples of each."""

    tasks: Sequence[Task]
    tokens: int
    samples: int
    first_seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigurationError(f"samples is {self.samples}, but must be 1 or more")


@dataclass(frozen=True)
class Outcome:
    """One answer."""

    task: str
    seed: int
    score: float
    prompt_tokens: int
    ttft_s: float
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class ModelRun:
    """All answers of one model."""

    name: str
    facts: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    peak_memory_mb: float | None

    def scores(self, task: str | None = None) -> list[float]:
        """Scores of one task, or of all, in the order of the samples."""
        return [o.score for o in self.outcomes if task in (None, o.task)]

    def median_ttft_s(self, task: str | None = None) -> float:
        """Median time to the first token, in seconds."""
        return median(o.ttft_s for o in self.outcomes if task in (None, o.task))


@dataclass(frozen=True)
class Row:
    """One task (or all together, `task` "all") of two models side by side."""

    task: str
    samples: int
    baseline: Interval
    candidate: Interval
    difference: Interval
    ttft_ratio: float


def run_model(name: str, load: Loader, setup: Setup, progress: Progress) -> ModelRun:
    """Loads a model, asks it every sample of every task, and lets it go."""
    model = load()
    outcomes = []
    for task in setup.tasks:
        for seed in range(setup.first_seed, setup.first_seed + setup.samples):
            outcomes.append(_ask(model, task, seed, setup.tokens))
            progress(f"{name}: {task.name}")
    return ModelRun(name, model.facts, outcomes, model.peak_memory_mb())


def _ask(model: AnswerModel, task: Task, seed: int, tokens: int) -> Outcome:
    prompt = fitted_prompt(task, seed, tokens, lambda s: encode_sample(model.tokenizer, s))
    answer = model.answer(prompt.ids, task.max_new_tokens)
    score = task.score(answer.text, prompt.sample)
    return Outcome(
        task.name,
        seed,
        score,
        answer.prompt_tokens,
        answer.ttft_s,
        answer.text,
        prompt.sample.references,
    )


def compare(baseline: ModelRun, candidate: ModelRun) -> list[Row]:
    """A row for each task and one for all, the candidate's scores minus the baseline's.

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
    rows = [_row(task, task, baseline, candidate) for task in tasks]
    return [*rows, _row("all", None, baseline, candidate)] if len(tasks) > 1 else rows


def _row(name: str, task: str | None, baseline: ModelRun, candidate: ModelRun) -> Row:
    ours, theirs = candidate.scores(task), baseline.scores(task)
    return Row(
        name,
        len(ours),
        score_interval(theirs),
        score_interval(ours),
        paired_difference(ours, theirs),
        candidate.median_ttft_s(task) / baseline.median_ttft_s(task),
    )
