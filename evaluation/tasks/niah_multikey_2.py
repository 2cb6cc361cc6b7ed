"""RULER's niah_multikey_2: one number, in a text that is nothing but numbers under other keys."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_multikey_2",
    description="one number, in a text that is nothing but numbers under other keys",
    make=Retrieval(haystack="needles").make,
    scoring="all",
    max_new_tokens=32,
    unit_tokens=26,
)
