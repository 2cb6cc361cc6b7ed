"""RULER's niah_single_3: one UUID under one key, in an essay."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_single_3",
    description="one UUID under one key, in an essay",
    make=Retrieval(haystack="essay", value="uuid").make,
    scoring="all",
    max_new_tokens=64,
    unit_tokens=30,
)
