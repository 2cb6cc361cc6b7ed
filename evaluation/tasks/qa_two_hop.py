"""RULER's qa_2 on text of our own: a question that needs two documents, one naming the other."""

from random import Random
from typing import Final

from trianglemix.evaluation.task import Sample, Task
from trianglemix.evaluation.tasks._people import documents, people, question_prompt


def make(random: Random, size: int) -> Sample:
    """A question about the teacher of one of `size + 2` people."""
    everyone = people(random, size + 2)
    pupil, teacher = everyone[0], everyone[1]
    question, answer = random.choice(
        (
            (f"In which town was the person born who trained {pupil.name}?", teacher.town),
            (f"In which year was the person born who trained {pupil.name}?", str(teacher.year)),
        )
    )
    text = documents(random, everyone)
    return Sample(question_prompt(text, question), " Answer:", (answer,))


TASK: Final = Task(
    name="qa_2",
    description="a fact about a person whom another document names",
    make=make,
    scoring="any",
    max_new_tokens=32,
    unit_tokens=72,
)
