"""Answers of models to samples, scored and timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


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

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Outcome:
        """What `dataclasses.asdict` gave, written to a file and read again."""
        return cls(**{**content, "references": tuple(content["references"])})


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

    def ttft_s(self, task: str | None = None) -> list[float]:
        """Seconds to the first token, in the same order."""
        return [o.ttft_s for o in self.outcomes if task in (None, o.task)]

    def median_ttft_s(self, task: str | None = None) -> float:
        """Median time to the first token, in seconds."""
        return median(self.ttft_s(task))
