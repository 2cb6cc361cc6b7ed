"""RULER's niah_single_3: one UUID under one key, in an essay."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="essay", value="uuid").task(
    "niah_single_3", "one UUID under one key, in an essay", max_new_tokens=64, unit_tokens=30
)
