"""RULER's niah_multiquery: four numbers under four keys, all asked for, in an essay."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="essay", keys=4, queries=4).task(
    "niah_multiquery",
    "four numbers under four keys, all asked for, in an essay",
    max_new_tokens=96,
    unit_tokens=30,
)
