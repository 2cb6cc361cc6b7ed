"""RULER's niah_multiquery: four numbers under four keys, all asked for, in an essay."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_multiquery",
    description="four numbers under four keys, all asked for, in an essay",
    make=Retrieval(haystack="essay", keys=4, queries=4).make,
    scoring="all",
    max_new_tokens=96,
    unit_tokens=30,
)
