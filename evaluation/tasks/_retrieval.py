"""Needles in a haystack: the eight retrieval tasks differ only in the numbers given here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from trianglemix.evaluation.task import Sample, Task
from trianglemix.evaluation.tasks._haystack import essay, noise, scatter
from trianglemix.evaluation.tasks._words import distinct_keys, distinct_numbers, distinct_uuids

_MAKERS: Final[dict[str, Callable[[Random, int], list[str]]]] = {
    "word": distinct_keys,
    "number": distinct_numbers,
    "uuid": distinct_uuids,
}


@dataclass(frozen=True)
class Retrieval:
    """What is hidden, in what, and how much of it is asked for.

    With `haystack="needles"` the filler is made of needles as well, under keys that nobody asks
    for: every sentence looks like the answer.
    """

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values_per_key: int = 1
    queries: int = 1

    def task(self, name: str, description: str, *, max_new_tokens: int, unit_tokens: float) -> Task:
        """The task that asks for all of it."""
        return Task(name, description, self.make, "all", max_new_tokens, unit_tokens)

    def make(self, random: Random, size: int) -> Sample:
        """A sample with `size` sentences of filler."""
        decoys = size if self.haystack == "needles" else 0
        keys = _MAKERS[self.key](random, self.keys + decoys)
        values = _MAKERS[self.value](random, len(keys) * self.values_per_key)
        owned = {
            key: values[i * self.values_per_key : (i + 1) * self.values_per_key]
            for i, key in enumerate(keys)
        }
        asked = keys[: self.queries]
        hidden = [_needle(self.value, key, v) for key in keys[: self.keys] for v in owned[key]]
        random.shuffle(hidden)
        text = scatter(random, hidden, self._filler(random, size, keys[self.keys :], owned))
        references = tuple(value for key in asked for value in owned[key])
        return _sample(self.value, asked, references, text)

    def _filler(
        self, random: Random, size: int, decoys: list[str], owned: dict[str, list[str]]
    ) -> list[str]:
        if self.haystack == "needles":
            return [_needle(self.value, key, owned[key][0]) for key in decoys]
        return (noise if self.haystack == "noise" else essay)(random, size)


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _sample(kind: str, asked: list[str], references: tuple[str, ...], text: str) -> Sample:
    names = ", ".join(asked[:-1]) + f" and {asked[-1]}" if len(asked) > 1 else asked[0]
    several = len(references) > 1
    what = f"all the special magic {kind}s" if several else f"the special magic {kind}"
    prompt = (
        f"Some special magic {kind}s are hidden in the following text. Remember them: you will be "
        f"asked about them afterwards.\n{text}\n"
        f"What {'are' if several else 'is'} {what} for {names} mentioned in the provided text?"
    )
    prefix = (
        f" The special magic {kind}{'s' if several else ''} for {names} mentioned in the provided "
        f"text {'are' if several else 'is'}"
    )
    return Sample(prompt, prefix, references)
