"""What the runner needs of a model: prompts in, answers and their cost out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trianglemix.evaluation.task import Sample
from trianglemix.runtime.errors import FolderError
from trianglemix.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """New text, the prompt's length in tokens, seconds to the first token."""

    text: str
    prompt_tokens: int
    ttft_s: float


class AnswerModel(Protocol):
    """A loaded model that answers greedily, one prompt at a time."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the report says of it: kind, layers, pattern, device."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, with its chat template."""

    def answer(self, ids: tuple[int, ...], max_new_tokens: int) -> Answer:
        """Continues the prompt until the model stops or the tokens are spent."""

    def peak_memory_mb(self) -> float | None:
        """Largest memory since it was loaded, in MiB; None where it cannot be told apart."""


Loader = Callable[[], AnswerModel]
"""Loads a model, so that a comparison can hold one at a time."""


def encode_sample(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """Token ids of a question (a chat where there is a template) and of the answer's start."""
    try:
        ids = tokenizer.encode_chat([{"role": "user", "content": sample.prompt}])
    except FolderError:
        return tokenizer.encode(sample.prompt + sample.answer_prefix)
    added = tokenizer.encode("")  # a beginning-of-text token must not stand in the middle
    prefix = tokenizer.encode(sample.answer_prefix.lstrip())
    return ids + (prefix[len(added) :] if prefix[: len(added)] == added else prefix)


def reset_peak_memory() -> bool:
    """Lets the kernel count this process's peak memory anew (Linux); False where it will not."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False
