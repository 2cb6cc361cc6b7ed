"""Prompts of a wanted number of tokens: samples are grown until they fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.task import Sample, Task

_ROUNDS: Final = 12


@dataclass(frozen=True)
class Prompt:
    """A sample as the model's token ids, answer prefix included."""

    sample: Sample
    ids: tuple[int, ...]


Encode = Callable[[Sample], list[int]]
"""Turns a sample into token ids, with the model's chat template where it has one."""


def fitted_prompt(task: Task, seed: int, tokens: int, encode: Encode) -> Prompt:
    """The largest sample found whose prompt and answer fit into `tokens` tokens.

    The seed alone fixes keys, values and places, so that two models get the same questions.

    Raises:
        ConfigurationError: even the smallest sample is longer than that.
    """
    room = tokens - task.max_new_tokens
    size = max(1, int(room / task.unit_tokens))
    fitting: tuple[int, Prompt] | None = None
    too_large: int | None = None
    for _ in range(_ROUNDS):
        prompt = _build(task, seed, size, encode)
        length = len(prompt.ids)
        if length <= room:
            fitting = (size, prompt)
            if room - length <= 2 * task.unit_tokens:
                break
            grown = max(size + 1, int(size * room / length))
        else:
            too_large = size
            grown = size
        lowest = fitting[0] + 1 if fitting else 1
        if too_large is None:
            size = grown
        elif lowest >= too_large:
            break
        else:
            size = (lowest + too_large) // 2 if grown >= too_large else grown
    if fitting is None:
        raise ConfigurationError(
            f"task {task.name} does not fit into {tokens} tokens: its smallest prompt and answer "
            "are longer; ask for more tokens"
        )
    return fitting[1]


def _build(task: Task, seed: int, size: int, encode: Encode) -> Prompt:
    sample = task.make(Random(f"{task.name}/{seed}"), size)
    return Prompt(sample, tuple(encode(sample)))
