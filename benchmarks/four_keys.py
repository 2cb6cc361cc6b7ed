"""Retrieval among 4 keys in two kinds of filler that a model of 135 million parameters can read.

RULER's own task (`niah_multikey_1`, essays and compound keys) is too hard for SmolLM2 at 8,000
tokens: the dense model answers a quarter, and a check with it is blind.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from trianglemix.evaluation.task import Sample, Task
from trianglemix.evaluation.tasks._haystack import scatter
from trianglemix.evaluation.tasks._retrieval import Retrieval
from trianglemix.evaluation.tasks._words import ADJECTIVES, NOUNS

_CITIES: Final = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Quito", "Vienna", "Nairobi", "Prague",
    "Hanoi", "Athens", "Boston", "Madrid", "Zurich", "Manila",
)  # fmt: skip
_WORDS: Final = (*NOUNS, *ADJECTIVES)
_SENTENCE: Final = 12  # words
_KEYS: Final = 4


def among_words(random: Random, size: int) -> Sample:
    """Five digits for each of four cities, among `size` sentences of random words."""
    cities = random.sample(_CITIES, _KEYS)
    numbers = [str(n) for n in random.sample(range(10_000, 100_000), _KEYS)]
    needles = [
        f"The special magic number for {city} is {number}."
        for city, number in zip(cities, numbers, strict=True)
    ]
    random.shuffle(needles)
    filler = [
        " ".join(random.choice(_WORDS) for _ in range(_SENTENCE)).capitalize() + "."
        for _ in range(size)
    ]
    prompt = (
        "Special magic numbers are hidden in the following text. Remember them.\n\n"
        f"{scatter(random, needles, filler)}\n\n"
        f"What is the special magic number for {cities[0]} mentioned in the text above? "
        "Answer with the number only."
    )
    return Sample(prompt, f" The special magic number for {cities[0]} is", (numbers[0],))


def _task(name: str, description: str, make: Callable[[Random, int], Sample]) -> Task:
    return Task(name, description, make, "all", max_new_tokens=32, unit_tokens=25)


TASKS: Final = {
    task.name: task
    for task in (
        _task(
            "4 keys among remarks",
            "one number of seven digits among four, in a remark said again and again",
            Retrieval(haystack="noise", keys=_KEYS).make,
        ),
        _task(
            "4 keys among words",
            "one number of five digits among four, in random words",
            among_words,
        ),
    )
}
"""By name; half of the samples are taken from each."""
