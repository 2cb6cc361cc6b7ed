"""RULER's cwe: the ten words that a list repeats most often."""

from random import Random
from typing import Final

from trianglemix.evaluation.task import Sample, Task
from trianglemix.evaluation.tasks._words import ADJECTIVES, NOUNS

_COMMON: Final = 10
_COMMON_TIMES: Final = 30
_RARE_TIMES: Final = 3
_SHOWN_TIMES: Final = (10, 2)


def _list(random: Random, common: list[str], rare: list[str], times: tuple[int, int]) -> str:
    words = common * times[0] + rare * times[1]
    random.shuffle(words)
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def make(random: Random, size: int) -> Sample:
    """Ten words thirty times each, and `size` other words three times each, after an example."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    known = list(ADJECTIVES + NOUNS)
    pool = random.sample(known, min(len(known), 2 * _COMMON + 10 + size))
    while len(pool) < 2 * _COMMON + 10 + size:
        n = random.randrange(pairs)
        pool.append(ADJECTIVES[n // len(NOUNS)] + NOUNS[n % len(NOUNS)])
    shown, common, rest = pool[:_COMMON], pool[_COMMON : 2 * _COMMON], pool[2 * _COMMON :]
    example = _list(random, shown, rest[:10], _SHOWN_TIMES)
    text = _list(random, common, rest[10:], (_COMMON_TIMES, _RARE_TIMES))
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    question = "Question: What are the 10 most common words in the above list?"
    answer = "Answer: The top 10 words that appear most often in the list are:"
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(shown, 1))
    prompt = f"{task}\n{example}\n{question} {answer} {listed}\n{task}\n{text}\n{question}"
    return Sample(prompt, f" {answer}", tuple(common))


TASK: Final = Task(
    name="cwe",
    description="the ten words of a list that come thirty times and not three",
    make=make,
    scoring="all",
    max_new_tokens=96,
    unit_tokens=16,
)
