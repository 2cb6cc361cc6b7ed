"""RULER's qa_1 on text of our own: a question that one document among many answers."""

from random import Random
from typing import Final

from trianglemix.evaluation.task import Sample, Task
from trianglemix.evaluation.tasks._people import documents, people, question_prompt


def make(random: Random, size: int) -> Sample:
    """A question about one of `size + 2` people."""
    everyone = people(random, size + 2)
    person = everyone[0]
    question, answer = random.choice(
        (
            (f"In which town was {person.name} born?", person.town),
            (f"In which year was {person.name} born?", str(person.year)),
            (f"What was the job of {person.name}?", person.job),
        )
    )
    text = documents(random, everyone)
    return Sample(question_prompt(text, question), " Answer:", (answer,))


TASK: Final = Task(
    name="qa_1",
    description="a fact that one document among many states",
    make=make,
    scoring="any",
    max_new_tokens=32,
    unit_tokens=72,
)
