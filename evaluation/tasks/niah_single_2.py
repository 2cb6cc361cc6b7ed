"""RULER's niah_single_2: one number under one key, in an essay."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_single_2",
    description="one number under one key, in an essay",
    make=Retrieval(haystack="essay").make,
    scoring="all",
    max_new_tokens=32,
    unit_tokens=30,
)
