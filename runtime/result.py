"""What a generation hands out: tokens as they come, and each prompt's result with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trianglemix.runtime.backends.backend import Kernel

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """One generated token: the prompt's index in its batch, the id, and the text it completes."""

    row: int
    id: int
    text: str


@dataclass(frozen=True)
class GenerationResult:
    """What one prompt gave.

    `ids` are the new tokens, a stop token included; `text` leaves special tokens out and is empty
    without a tokenizer. `ttft_s` (seconds) reaches from the call to the first token;
    `tokens_per_s` counts the tokens after it, 0 where there are none. `peak_rss_mb` (MiB) is the
    process's largest resident set so far. `kernel` says what ran the attention.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    ttft_s: float
    tokens_per_s: float
    peak_rss_mb: float
    kernel: Kernel
    provider: str
