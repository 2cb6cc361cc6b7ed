"""RULER's niah_multikey_1: one number, with three other keys that look like it, in an essay."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_multikey_1",
    description="one number, with three other keys that look like it, in an essay",
    make=Retrieval(haystack="essay", keys=4).make,
    scoring="all",
    max_new_tokens=32,
    unit_tokens=30,
)
