"""Text to hide things in: one repeated remark, or an essay that never says the same twice."""

from __future__ import annotations

from random import Random
from typing import Final

from trianglemix.evaluation.tasks._words import ADJECTIVES, JOBS, NOUNS, PLACES

NOISE: Final = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
"""The remark that RULER's first task repeats."""

_OPENINGS: Final = (
    "Most people in {place} would say that",
    "It took me years to notice that",
    "An old {job} once told me that",
    "If you look closely,",
    "In practice,",
    "There is a reason why",
    "I used to believe that",
    "When a {job} starts a new piece of work,",
    "What surprised everyone was that",
    "Ask any {job} and you will hear that",
    "Over the winter we found out that",
    "Nobody planned it, but",
)
_MIDDLES: Final = (
    "a {adjective} {noun} is worth more than a {other} {thing}",
    "the {noun} near the {thing} changed how the {job} worked",
    "every {adjective} idea begins with a {other} question about a {noun}",
    "the {thing} was built for a {adjective} purpose and used for a {other} one",
    "doing the {adjective} thing first makes the {noun} easier to keep",
    "the best {noun} is the one that a {job} can repair without a {thing}",
    "you learn more from a {adjective} {noun} than from a whole {thing} of advice",
    "a {noun} looks {adjective} from far away and {other} from nearby",
    "the {adjective} {noun} and the {other} {thing} were made by the same hands",
    "a {job} who walks past the {noun} each day stops seeing the {thing}",
)
_CLOSINGS: Final = (
    "and that is harder than it sounds.",
    "which is why the {noun} is still there.",
    "although few would admit it in {place}.",
    "and the rest follows from that.",
    "but only if someone writes it down.",
    "so it pays to wait for a {adjective} day.",
    "even when the {thing} says otherwise.",
    "and we should be glad of it.",
    "as the people of {place} know well.",
    "and I have not changed my mind since.",
)


def essay_sentence(random: Random) -> str:
    """One grammatical sentence that means little, different nearly every time."""
    template = " ".join(random.choice(part) for part in (_OPENINGS, _MIDDLES, _CLOSINGS))
    words = {
        "adjective": random.choice(ADJECTIVES),
        "other": random.choice(ADJECTIVES),
        "noun": random.choice(NOUNS),
        "thing": random.choice(NOUNS),
        "job": random.choice(JOBS),
        "place": random.choice(PLACES),
    }
    return template.format(**words)


def essay(random: Random, sentences: int) -> list[str]:
    """That many sentences."""
    return [essay_sentence(random) for _ in range(sentences)]


def noise(random: Random, sentences: int) -> list[str]:
    """The same remark again and again."""
    return [NOISE] * sentences


def scatter(random: Random, hidden: list[str], filler: list[str]) -> str:
    """`hidden` sentences at random places among the filler, each on its own place, one text."""
    total = len(hidden) + len(filler)
    places = set(random.sample(range(total), len(hidden)))
    needles, rest = iter(hidden), iter(filler)
    return " ".join(next(needles) if i in places else next(rest) for i in range(total))
