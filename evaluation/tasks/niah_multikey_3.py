"""RULER's niah_multikey_3: one UUID under a UUID, in a text of nothing else."""

from typing import Final

from trianglemix.evaluation.task import Task
from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Task(
    name="niah_multikey_3",
    description="one UUID under a UUID, in a text of nothing else",
    make=Retrieval(haystack="needles", key="uuid", value="uuid").make,
    scoring="all",
    max_new_tokens=64,
    unit_tokens=60,
)
