"""The thirteen tasks: the right answer is in the prompt, seeds decide, lengths are kept."""

from __future__ import annotations

from random import Random

import pytest
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.prompts import fitted_prompt
from trianglemix.evaluation.task import Sample
from trianglemix.evaluation.task_list import all_tasks, pick_tasks

NAMES = (
    "cwe",
    "fwe",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "qa_1",
    "qa_2",
    "vt",
)


def _words(sample: Sample) -> list[int]:
    """A tokenizer of words: enough to count with."""
    return [0] * len((sample.prompt + sample.answer_prefix).split())


def test_there_are_the_thirteen_tasks_of_ruler() -> None:
    assert sorted(all_tasks()) == sorted(NAMES)
    with pytest.raises(ConfigurationError, match="nothing"):
        pick_tasks(["vt", "nothing"])


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_holds_its_answer_and_its_seed_decides_it(name: str) -> None:
    task = all_tasks()[name]
    sample = task.make(Random(1), 60)
    assert sample == task.make(Random(1), 60)
    assert sample != task.make(Random(2), 60)
    assert all(reference in sample.prompt for reference in sample.references)
    assert not any(reference in sample.answer_prefix for reference in sample.references)
    right = " and ".join(sample.references)
    assert task.score(right.upper(), sample) == 1.0
    assert task.score("", sample) == 0.0
    if task.scoring == "all" and len(sample.references) > 1:
        assert task.score(sample.references[0], sample) == 1 / len(sample.references)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1200, 5000])
def test_prompts_fill_the_length_and_keep_within_it(name: str, length: int) -> None:
    task = all_tasks()[name]
    for seed in range(3):
        prompt = fitted_prompt(task, seed, length, _words)
        total = len(prompt.ids) + task.max_new_tokens
        assert length - max(120, length // 10) <= total <= length


def test_a_length_too_short_for_the_task_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cwe does not fit into 400 tokens"):
        fitted_prompt(all_tasks()["cwe"], 0, 400, _words)


def test_the_needles_are_what_the_question_asks_for() -> None:
    """Every asked key stands in the text exactly as often as it has values, with those values."""
    for name, count in (("niah_multikey_1", 1), ("niah_multiquery", 4), ("niah_multivalue", 4)):
        sample = all_tasks()[name].make(Random(5), 40)
        assert len(set(sample.references)) == count
        lines = [s for s in sample.prompt.split(". ") if s.startswith("One of the special magic")]
        assert len(lines) == (1 if name == "single" else 4)
        for reference in sample.references:
            assert sum(reference in line for line in lines) == 1


def test_chains_and_counts_are_true() -> None:
    chain = all_tasks()["vt"].make(Random(3), 30)
    lines = [line for line in chain.prompt.splitlines() if line.startswith("VAR")]
    names = list(chain.references)
    assert [line.split()[1] for line in lines] == names
    assert [line.split()[-1] for line in lines[1:]] == [f"{name}." for name in names[:-1]]
    for name in ("cwe", "fwe"):
        sample = all_tasks()[name].make(Random(4), 800)
        text = sample.prompt.split("Memorize the ones that appear most often.")[-1].split()
        counts = {word: text.count(word) for word in set(text) if word.isalpha()}
        least = min(counts[word] for word in sample.references)
        others = [n for word, n in counts.items() if word not in sample.references]
        assert all(n < least for n in others), name


def test_two_hop_questions_need_the_document_of_the_teacher() -> None:
    sample = all_tasks()["qa_2"].make(Random(8), 20)
    pupil = sample.prompt.rsplit("who trained ", 1)[1].rstrip("?")
    documents = sample.prompt.split("Document ")
    own = next(d for d in documents if f"\n{pupil} was born" in d)
    teacher = own.split("Trained under ")[1].split(", ")[0]
    other = next(d for d in documents if f"\n{teacher} was born" in d)
    assert sample.references[0] in other.split(". Trained")[0]
