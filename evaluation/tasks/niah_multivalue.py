"""RULER's niah_multivalue: four numbers under one key, in an essay."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_multivalue",
    description="four numbers under one key, in an essay",
    make=Retrieval(haystack="essay", values_per_key=4).make,
    scoring="all",
    max_new_tokens=96,
    unit_tokens=30,
)
