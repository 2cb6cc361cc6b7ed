"""RULER's niah_multivalue: four numbers under one key, in an essay."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="essay", values_per_key=4).task(
    "niah_multivalue", "four numbers under one key, in an essay", max_new_tokens=96, unit_tokens=30
)
