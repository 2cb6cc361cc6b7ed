"""What a task is: a seeded generator of samples of any size, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Scoring = Literal["all", "any"]
"""`all`: the share of the references that the answer holds; `any`: whether it holds one of them."""


@dataclass(frozen=True)
class Sample:
    """One question. The model answers after `answer_prefix`, which begins its own turn."""

    prompt: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One kind of question.

    `make(random, size)` builds a sample around `size` units of filler (sentences, needles, words):
    the same random state and size give the same sample, and more units give a longer prompt.
    `unit_tokens` is a first guess of the tokens of a unit.
    """

    name: str
    description: str
    make: Callable[[Random, int], Sample]
    scoring: Scoring
    max_new_tokens: int
    unit_tokens: float

    def score(self, answer: str, sample: Sample) -> float:
        """From 0 to 1, by string match without regard to case (RULER's own metric)."""
        text = answer.lower()
        found = [reference.lower() in text for reference in sample.references]
        return float(any(found)) if self.scoring == "any" else sum(found) / len(found)
