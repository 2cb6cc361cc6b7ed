"""RULER's niah_single_1: one number under one key, in a repeated remark."""

from typing import Final

from trianglemix.evaluation.tasks._retrieval import Retrieval

TASK: Final = Retrieval(haystack="noise").task(
    "niah_single_1",
    "one number under one key, in a repeated remark",
    max_new_tokens=32,
    unit_tokens=24,
)
