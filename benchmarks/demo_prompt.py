"""A long prompt that hides one number, and the question that asks for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from trianglemix.runtime.tokenizer import Tokenizer

CITY: Final = "Lisbon"
NUMBER: Final = "48213"
_NEEDLE: Final = f"The special magic number for {CITY} is {NUMBER}."
_TASK: Final = "A special magic number is hidden in the following text. Remember it.\n\n"
_QUESTION: Final = (
    f"\n\nWhat is the special magic number for {CITY} mentioned in the text above? "
    "Answer with the number only."
)
_DEPTH: Final = 0.35  # where the number is, as a share of the text: far outside every window
_SEED: Final = 7

_SUBJECTS: Final = (
    "The harbour master", "A young baker", "The old librarian", "Our neighbour", "The ferry pilot",
    "A travelling musician", "The village teacher", "The gardener", "A retired surveyor",
    "The night watchman", "The carpenter", "A visiting doctor",
)  # fmt: skip
_ACTIONS: Final = (
    "walked along the river", "repaired the wooden gate", "read the morning paper",
    "carried a basket of apples", "watched the clouds over the hills", "wrote a letter to a friend",
    "painted the door green", "counted the boats in the bay", "listened to the rain",
    "swept the narrow street", "planted beans behind the house", "mended an old coat",
)  # fmt: skip
_TIMES: Final = (
    "before breakfast", "until the bells rang", "while the market opened", "on a quiet afternoon",
    "after the long winter", "without any hurry", "as the tide came in", "under a grey sky",
    "in the first warm week of spring", "when the lamps were lit",
)  # fmt: skip


@dataclass(frozen=True)
class HiddenNumber:
    """The prompt as token ids, and the number that its answer must contain."""

    ids: tuple[int, ...]
    answer: str


def hide_number(tokenizer: Tokenizer, tokens: int) -> HiddenNumber:
    """The longest prompt of at most `tokens` tokens, chat template included."""
    sentences = _sentences(tokens // 8)

    def ids_of(count: int) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": _text(sentences[:count])}])

    count = _largest(lambda n: len(ids_of(n)) <= tokens, len(sentences))
    return HiddenNumber(tuple(ids_of(count)), NUMBER)


def _text(sentences: Sequence[str]) -> str:
    place = int(len(sentences) * _DEPTH)
    return _TASK + " ".join([*sentences[:place], _NEEDLE, *sentences[place:]]) + _QUESTION


def _sentences(count: int) -> list[str]:
    choose = random.Random(_SEED).choice
    return [f"{choose(_SUBJECTS)} {choose(_ACTIONS)} {choose(_TIMES)}." for _ in range(count)]


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits; whatever fits, less fits too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
