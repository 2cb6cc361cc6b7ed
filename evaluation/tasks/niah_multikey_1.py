"""RULER's niah_multikey_1: one number, with three other keys that look like it, in an essay."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="essay", keys=4).task(
    "niah_multikey_1",
    "one number, with three other keys that look like it, in an essay",
    max_new_tokens=32,
    unit_tokens=30,
)
