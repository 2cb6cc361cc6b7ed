"""What the probe reads: prompts whose right answer begins with a known token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.sections import ProbeSample
from trianglemix.evaluation.model import encode_sample
from trianglemix.evaluation.prompts import fitted_prompt
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.runtime.tokenizer import Tokenizer

PROBE_TASKS: Final = ("niah_single_2", "niah_multikey_1", "niah_multikey_2")
"""The built-in data: retrieval, whose answer lies far away from the question."""
_FIRST_SEED: Final = 100_000
"""Far from the seeds of an evaluation: nobody is to be tested on what the layers were chosen by."""


@dataclass(frozen=True)
class DataSettings:
    """Built-in tasks, or a file of one's own; prompts of `tokens` tokens, `samples` of them."""

    samples: int
    tokens: int
    file: Path | None = None
    tasks: Sequence[str] = PROBE_TASKS

    @property
    def description(self) -> str:
        """One line for the plan file."""
        source = self.file.name if self.file else ", ".join(self.tasks)
        return f"{source}; {self.samples} prompts of up to {self.tokens} tokens"


def probe_samples(tokenizer: Tokenizer, settings: DataSettings) -> list[ProbeSample]:
    """The samples, in a fixed order.

    A file holds one JSON object a line, with `prompt` and `answer`; the prompt is taken as it is.

    Raises:
        AnalysisError: the file cannot be read or has too few lines.
        ConfigurationError: a built-in task does not fit into that many tokens.
    """
    if settings.file is not None:
        return _from_file(tokenizer, settings.file, settings)
    tasks = pick_tasks(settings.tasks)
    samples = []
    for number in range(settings.samples):
        task = tasks[number % len(tasks)]
        prompt = fitted_prompt(
            task, _FIRST_SEED + number, settings.tokens, lambda s: encode_sample(tokenizer, s)
        )
        samples.append(_sample(tokenizer, list(prompt.ids), prompt.sample.references[0]))
    return samples


def block_prompts(tokenizer: Tokenizer, settings: DataSettings) -> list[tuple[int, ...]]:
    """Prompts of `settings.tokens` tokens, for figures that depend on the length.

    Texts of a file are cut there; built-in ones are a few tokens shorter. Answers do not matter.

    Raises:
        AnalysisError: the file cannot be read or has too few lines that are long enough.
    """
    if settings.file is None:
        return [sample.ids for sample in probe_samples(tokenizer, settings)]
    encoded = [tokenizer.encode(prompt) for prompt, _ in _lines(settings.file)]
    fitting = [tuple(ids[: settings.tokens]) for ids in encoded if len(ids) >= settings.tokens]
    if len(fitting) < settings.samples:
        raise AnalysisError(
            f"{settings.file} has {len(fitting)} prompts of at least {settings.tokens} tokens, but "
            f"{settings.samples} were asked for; give longer texts or ask for fewer or shorter ones"
        )
    return fitting[: settings.samples]


def _lines(file: Path) -> list[tuple[str, str]]:
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
        return [(str(line["prompt"]), str(line["answer"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnalysisError(
            f"{file} cannot be read as data: {error!r}; it must hold one JSON object with prompt "
            "and answer on each line"
        ) from error


def _from_file(tokenizer: Tokenizer, file: Path, settings: DataSettings) -> list[ProbeSample]:
    pairs = _lines(file)
    encoded = [(tokenizer.encode(prompt), answer) for prompt, answer in pairs]
    fitting = [(ids, answer) for ids, answer in encoded if len(ids) <= settings.tokens]
    if len(fitting) < settings.samples:
        raise AnalysisError(
            f"{file} has {len(fitting)} prompts of at most {settings.tokens} tokens, but "
            f"{settings.samples} samples were asked for; give more lines or ask for fewer samples"
        )
    return [_sample(tokenizer, ids, answer) for ids, answer in fitting[: settings.samples]]


def _sample(tokenizer: Tokenizer, ids: list[int], answer: str) -> ProbeSample:
    """The answer's first token that says something: blanks before it join the prompt."""
    added = tokenizer.encode("")
    tokens = tokenizer.encode(f" {answer}")
    tokens = tokens[len(added) :] if tokens[: len(added)] == added else tokens
    for blanks, token in enumerate(tokens):
        if tokenizer.decode([token]).strip():
            return ProbeSample((*ids, *tokens[:blanks]), token)
    raise AnalysisError(f"the answer {answer!r} has no token; give answers that are not empty")
