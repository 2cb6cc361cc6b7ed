"""Asks models the tasks' samples, each sample of every model before the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.model import AnswerModel, Loader, encode_sample
from trianglemix.evaluation.outcome import ModelRun, Outcome
from trianglemix.evaluation.prompts import fitted_prompt
from trianglemix.evaluation.record import Record
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

    def questions(self) -> Iterator[tuple[Task, int]]:
        """`(task, seed)` of every sample, task by task."""
        for task in self.tasks:
            for seed in range(self.first_seed, self.first_seed + self.samples):
                yield task, seed


def run_model(name: str, load: Loader, setup: Setup, progress: Progress) -> ModelRun:
    """Loads a model, asks it every sample of every task, and lets it go."""
    (run,) = run_models([(name, load)], setup, progress)
    return run


def run_models(
    models: Sequence[tuple[str, Loader]],
    setup: Setup,
    progress: Progress,
    record: Record | None = None,
) -> list[ModelRun]:
    """Loads the models (the last one first), asks them every sample, and lets them go.

    Every sample is asked of all models before the next one, the order turned round each time, so
    that times to the first token are of one moment. What the record holds is not asked again.
    Memory is known of a model that is alone.
    """
    asked = record.load() if record else {}
    loaded = [load() for _, load in reversed(models)][::-1]
    names = [name for name, _ in models]
    runs: list[list[Outcome]] = [[] for _ in models]
    for number, (task, seed) in enumerate(setup.questions()):
        outcomes = asked.get((task.name, seed))
        if outcomes is not None:
            for name in names:
                progress(f"{name}: {task.name}")
        else:
            order = range(len(models))[:: -1 if number % 2 else 1]
            found = {}
            for place in order:
                found[place] = _ask(loaded[place], task, seed, setup.tokens)
                progress(f"{names[place]}: {task.name}")
            outcomes = [found[place] for place in sorted(found)]
            if record:
                record.add(outcomes)
        for run, outcome in zip(runs, outcomes, strict=True):
            run.append(outcome)
    memory = [loaded[0].peak_memory_mb()] if len(loaded) == 1 else [None] * len(loaded)
    return [
        ModelRun(name, model.facts, run, peak)
        for name, model, run, peak in zip(names, loaded, runs, memory, strict=True)
    ]


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
