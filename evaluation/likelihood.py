"""Log-likelihoods and greedy answers of an exported folder, for evaluation harnesses.

Exported models may give the logits of the last token only. So a text is scored by reading its
context in one step, and its continuation token by token, as it would be generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.kv_cache import KVCache
from trianglemix.runtime.session import TriangleSession
from trianglemix.runtime.tokenizer import Tokenizer

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of a continuation's probability; whether greedy decoding would give it."""

    logarithm: float
    greedy: bool


class FolderScorer:
    """Scores texts with a session. Prompts too long for the model lose their beginning."""

    def __init__(self, session: TriangleSession) -> None:
        if session.tokenizer is None:
            raise PromptError("the folder has no tokenizer.json, which texts need; export it again")
        self.session = session
        self.tokenizer: Tokenizer = session.tokenizer

    @property
    def max_length(self) -> int | None:
        """Tokens the model takes at most; None where its folder does not say."""
        return self.session.manifest.context_length

    def likelihood(self, context: str, continuation: str) -> Likelihood:
        """How likely `continuation` is after `context` (which may be empty)."""
        blanks = len(context) - len(context.rstrip())  # blanks belong to the continuation's token
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        start = self.tokenizer.encode(context)
        whole = self.tokenizer.encode(context + continuation)
        return self.token_likelihood(start or self._beginning(), whole[len(start) :])

    def rolling(self, text: str) -> float:
        """Log-likelihood of a whole text, in windows of the model's length."""
        added = self.tokenizer.encode("")
        ids = self.tokenizer.encode(text)[len(added) :]
        window = (self.max_length or len(ids) + 1) - 1
        total, context = 0.0, self._beginning()
        for begin in range(0, len(ids), max(1, window)):
            piece = ids[begin : begin + window]
            total += self.token_likelihood(context, piece).logarithm
            context = [piece[-1]]
        return total

    def token_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """The same for token ids; the context must not be empty."""
        if not continuation:
            return Likelihood(0.0, True)
        kept = list(context)
        if self.max_length is not None:
            kept = kept[-max(1, self.max_length - len(continuation) + 1) :]
        cache = self.session.new_cache()
        logits = _read(cache, kept, len(kept))
        total, greedy = 0.0, True
        for number, token in enumerate(continuation):
            total += float(_log_softmax(logits)[token])
            greedy = greedy and int(logits.argmax()) == token
            if number + 1 < len(continuation):
                logits = _read(cache, [token], len(kept))
        return Likelihood(total, greedy)

    def generate(self, context: str, until: Sequence[str], max_new_tokens: int) -> str:
        """Greedy answer, cut before the first of the `until` strings."""
        ids = self.tokenizer.encode(context)
        if self.max_length is not None:
            ids = ids[-max(1, self.max_length - max_new_tokens) :]
        text = self.session.generate(ids, max_new_tokens).text
        for stop in until:
            if stop:
                text = text.split(stop)[0]
        return text

    def _beginning(self) -> list[int]:
        """What stands before a text's first token: the tokenizer's own, else a stop token."""
        return self.tokenizer.encode("") or sorted(self.session.stop_ids)[:1] or [0]


def _read(cache: KVCache, ids: Sequence[int], prompt_end: int) -> FloatArray:
    """Logits `[vocabulary]` after these tokens joined the cache."""
    logits = cache.extend(np.array([ids], np.int64), None, prompt_end)
    assert logits is not None
    row: FloatArray = np.asarray(logits)[0].astype(np.float64)
    return row


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max()
    result: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return result
