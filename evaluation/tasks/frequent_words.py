"""RULER's fwe: the three most frequent coded words of a text whose words follow a zeta law."""

from itertools import accumulate
from random import Random
from typing import Final

from trianglemix.evaluation.task import Sample, Task

_ALPHA: Final = 2.0
_VOCABULARY: Final = 200
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def make(random: Random, size: int) -> Sample:
    """`size` words; word `r` has a share that falls with `1 / r^2`; the first is dots (noise)."""
    coded = ["".join(random.choice(_LETTERS) for _ in range(6)) for _ in range(_VOCABULARY)]
    ranked = ["...", *dict.fromkeys(coded)]
    shares = [rank**-_ALPHA for rank in range(1, len(ranked) + 1)]
    total = sum(shares)
    # Whole counts, largest first, so that the three most frequent words are never in doubt.
    counts = [max(1, round(size * share / total)) for share in shares[:4]]
    for rank in range(2, -1, -1):
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    words = [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]
    rare, weights = ranked[4:], list(accumulate(shares[4:]))
    left = max(0, size - len(words))
    seen: dict[str, int] = {}
    for word in random.choices(rare, cum_weights=weights, k=left):
        seen[word] = seen.get(word, 0) + 1
        words.append(word if seen[word] < counts[3] else "...")
    random.shuffle(words)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words.\n{' '.join(words)}\nQuestion: Do not provide any "
        "explanation. Please ignore the dots '...'. What are the three most frequently appeared "
        "words in the above coded text?"
    )
    prefix = (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    return Sample(prompt, prefix, tuple(ranked[1:4]))


TASK: Final = Task(
    name="fwe",
    description="the three most frequent made-up words of a text",
    make=make,
    scoring="all",
    max_new_tokens=48,
    unit_tokens=2.5,
)
