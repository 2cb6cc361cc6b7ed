"""Log-likelihoods and answers of an exported folder, for evaluation harnesses.

Exported models may give the logits of the last token only, so a text is scored token by token. What
counts as the prompt decides what the triangle layers drop: of a context and its continuation the
context alone, as when the continuation is generated; of a whole text all that the model reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from trianglemix.custom_ops.arrays import FloatArray
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.kv_cache import KVCache
from trianglemix.runtime.sampling import GREEDY, Sampling
from trianglemix.runtime.session import TriangleSession
from trianglemix.runtime.tokenizer import Tokenizer


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
        self._last: tuple[list[int], FloatArray] | None = None
        """The last context read, and the logits after it: choices of one token share them."""

    @property
    def max_length(self) -> int | None:
        """Tokens the model takes at most; None where its folder does not say."""
        return self.session.manifest.context_length

    def likelihood(self, context: str, continuation: str) -> Likelihood:
        """How likely `continuation` is after `context` (which may be empty)."""
        blanks = len(context) - len(context.rstrip())  # blanks belong to the continuation's token
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        start = self.encode(context)
        whole = self.encode(context + continuation)
        return self.token_likelihood(start or [self._beginning()], whole[len(start) :])

    def token_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """The same for token ids; the context must not be empty.

        Raises:
            PromptError: the continuation alone is longer than the model's context.
        """
        if not continuation:
            return Likelihood(0.0, True)
        kept = list(context)
        if self.max_length is not None:
            room = self.max_length - len(continuation) + 1  # the last token is not read
            if room < 1:
                raise PromptError(
                    f"a continuation of {len(continuation)} tokens, but the context has "
                    f"{self.max_length}; leave it out, or score it as a whole text"
                )
            kept = kept[-room:]
        if len(continuation) == 1 and self._last is not None and self._last[0] == kept:
            return _one_token(self._last[1], continuation[0])
        cache = self.session.new_cache()
        logits = _read(cache, kept, len(kept))
        self._last = kept, logits
        total, greedy = 0.0, True
        for number, token in enumerate(continuation):
            one = _one_token(logits, token)
            total, greedy = total + one.logarithm, greedy and one.greedy
            if number + 1 < len(continuation):
                logits = _read(cache, [token], len(kept))
        return Likelihood(total, greedy)

    def rolling(self, text: str) -> float:
        """Log-likelihood of a whole text, read as a prompt in windows of the model's length.

        The last window is filled up with text that the one before it has scored.

        Raises:
            PromptError: the model cannot tell where a prompt read in steps ends.
        """
        self._check_reads_prompts_in_steps()
        ids = self.encode(text)[len(self.tokenizer.encode("")) :]
        read = [self._beginning(), *ids]
        total = 0.0
        for begin, end, scored in _windows(len(ids), self.max_length):
            total += self._prompt_likelihood(read[begin:end], ids[end - scored : end])
        return total

    def _prompt_likelihood(self, prompt: Sequence[int], following: Sequence[int]) -> float:
        """Log-likelihood of the tokens that follow each of the prompt's last ones."""
        cache, unscored = self.session.new_cache(), len(prompt) - len(following)
        logits = _read(cache, prompt[: unscored + 1], len(prompt))
        total = float(_log_softmax(logits)[following[0]])
        steps = zip(prompt[unscored + 1 :], following[1:], strict=True)
        for token, right in steps:
            total += float(_log_softmax(_read(cache, [token], len(prompt)))[right])
        return total

    def _check_reads_prompts_in_steps(self) -> None:
        manifest = self.session.manifest
        if manifest.static is not None:
            raise PromptError(
                "static graphs give no logits in the middle of a prompt, which a whole text's "
                "log-likelihood needs; evaluate an export for cpu, cuda or hopper"
            )
        if manifest.length_switches and (self.max_length or np.inf) > min(manifest.length_switches):
            raise PromptError(
                f"beyond {min(manifest.length_switches)} tokens this model computes otherwise, so "
                "that a whole text cannot be read token by token; evaluate it with contexts and "
                "continuations"
            )
        if manifest.drops_keys and not manifest.takes_prompt_end:
            raise PromptError(
                "this model has no prompt_length input, without which a whole text's "
                "log-likelihood would be that of dense attention; export it again"
            )

    def generate(
        self,
        context: str,
        until: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The answer, cut before the first of the `until` strings."""
        ids = self.encode(context) or [self._beginning()]
        if self.max_length is not None:
            max_new_tokens = min(max_new_tokens, self.max_length - 1)
            ids = ids[-(self.max_length - max_new_tokens) :]
        text = ""
        for token in self.session.stream(ids, max_new_tokens, sampling=sampling):
            text += token.text
            ends = [text.find(stop) for stop in until if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids; a text that begins with the token that the tokenizer adds gets it once."""
        ids = self.tokenizer.encode(text)
        added = self.tokenizer.encode("")
        if added and ids[: 2 * len(added)] == [*added, *added]:
            return ids[len(added) :]
        return ids

    def _beginning(self) -> int:
        """What stands before a text's first token: the tokenizer's own, else a stop token."""
        added = self.tokenizer.encode("")
        if added:
            return added[-1]
        if self.tokenizer.bos_id is not None:
            return self.tokenizer.bos_id
        return min(self.session.stop_ids, default=0)


def _windows(length: int, most: int | None) -> Iterator[tuple[int, int, int]]:
    """`(begin, end, scored)`: of the tokens read from `begin` to `end` the last are scored."""
    step = most or max(1, length)
    for scored_from in range(0, length, step):
        end = min(scored_from + step, length)
        yield max(0, end - step), end, end - scored_from


def _read(cache: KVCache, ids: Sequence[int], prompt_end: int) -> FloatArray:
    """Logits `[vocabulary]` after these tokens joined the cache."""
    logits = cache.extend(np.array([ids], np.int64), None, prompt_end)
    assert logits is not None
    row: FloatArray = np.asarray(logits)[0].astype(np.float64)
    return row


def _one_token(logits: FloatArray, token: int) -> Likelihood:
    return Likelihood(float(_log_softmax(logits)[token]), int(logits.argmax()) == token)


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max()
    result: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return result
