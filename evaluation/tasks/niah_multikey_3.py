"""RULER's niah_multikey_3: one UUID under a UUID, in a text of nothing else."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="needles", key="uuid", value="uuid").task(
    "niah_multikey_3",
    "one UUID under a UUID, in a text of nothing else",
    max_new_tokens=64,
    unit_tokens=60,
)
