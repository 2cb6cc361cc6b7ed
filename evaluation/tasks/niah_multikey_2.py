"""RULER's niah_multikey_2: one number, in a text that is nothing but numbers under other keys."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="needles").task(
    "niah_multikey_2",
    "one number, in a text that is nothing but numbers under other keys",
    max_new_tokens=32,
    unit_tokens=26,
)
