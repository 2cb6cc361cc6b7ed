"""RULER's vt: which variables hold a value that was passed along a chain of assignments."""

from itertools import pairwise
from random import Random
from typing import Final

from trianglemix.evaluation.task import Sample, Task
from trianglemix.evaluation.tasks._haystack import noise

_HOPS: Final = 4
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _names(random: Random, count: int) -> list[str]:
    numbers = random.sample(range(26**5), count)
    return ["".join(_LETTERS[n // 26**i % 26] for i in range(5)) for n in numbers]


def make(random: Random, size: int) -> Sample:
    """One chain of five variables, its assignments in order, `size` remarks between them."""
    names = _names(random, _HOPS + 1)
    value = str(random.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    total = size + len(chain)
    places = set(random.sample(range(total), len(chain)))
    links, filler = iter(chain), iter(noise(random, size))
    text = "\n".join(next(links) if i in places else next(filler) for i in range(total))
    prompt = (
        "Memorize and track the chains of variable assignments hidden in the following text.\n\n"
        f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above, directly or through other variables."
    )
    prefix = (
        f" According to the chains of variable assignments in the text above, {len(names)} "
        f"variables are assigned the value {value}, they are:"
    )
    return Sample(prompt, prefix, tuple(names))


TASK: Final = Task(
    name="vt",
    description="the five variables that a value was passed along",
    make=make,
    scoring="all",
    max_new_tokens=48,
    unit_tokens=24,
)
