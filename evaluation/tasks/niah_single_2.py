"""RULER's niah_single_2: one number under one key, in an essay."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="essay").task(
    "niah_single_2", "one number under one key, in an essay", max_new_tokens=32, unit_tokens=30
)
