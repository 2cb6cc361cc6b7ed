"""RULER's niah_single_1: one number under one key, in a repeated remark."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_single_1",
    description="one number under one key, in a repeated remark",
    make=Retrieval(haystack="noise").make,
    scoring="all",
    max_new_tokens=32,
    unit_tokens=24,
)
