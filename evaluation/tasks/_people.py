"""Documents about made-up people, for questions that no model can answer from memory."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trianglemix.evaluation.tasks._words import FIRST_NAMES, JOBS, LAST_NAMES, NOUNS, PLACES


@dataclass(frozen=True)
class Person:
    """Facts about one person; names are different for all people of one text."""

    name: str
    job: str
    town: str
    year: int
    hobby: str
    teacher: str

    def document(self) -> str:
        """A short text that states every fact once."""
        return (
            f"{self.name} was born in {self.town} in {self.year}. Trained under {self.teacher}, "
            f"{self.name} became a {self.job} and stayed one for life. In the evenings {self.name} "
            f"collected old pictures of every {self.hobby} in the region."
        )


def people(random: Random, count: int) -> list[Person]:
    """`count` people, each the pupil of another one of them (of the next, around a ring)."""
    numbers = random.sample(range(len(FIRST_NAMES) * len(LAST_NAMES) * 26), count)
    names = [_name(n) for n in numbers]
    return [
        Person(
            name,
            random.choice(JOBS),
            random.choice(PLACES),
            random.randrange(1800, 1990),
            random.choice(NOUNS),
            names[(i + 1) % count],
        )
        for i, name in enumerate(names)
    ]


def _name(number: int) -> str:
    rest, first = divmod(number, len(FIRST_NAMES))
    initial, last = divmod(rest, len(LAST_NAMES))
    return f"{FIRST_NAMES[first]} {chr(ord('A') + initial)}. {LAST_NAMES[last]}"


def documents(random: Random, everyone: list[Person]) -> str:
    """Their documents, numbered, in a random order."""
    order = random.sample(everyone, len(everyone))
    return "\n\n".join(f"Document {i}:\n{p.document()}" for i, p in enumerate(order, 1))


def question_prompt(text: str, question: str) -> str:
    """Documents and a question about them."""
    return (
        "Answer the question based on the given documents. Only give me the answer and do not "
        f"output any other words.\n\nThe following are given documents.\n\n{text}\n\n"
        f"Answer the question based on the given documents. Question: {question}"
    )
