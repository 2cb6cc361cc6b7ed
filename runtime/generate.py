"""The generation loop: a prompt into the cache, chunk by chunk, then one token after another."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from trianglemix.runtime.backends.backend import Logits
from trianglemix.runtime.chunks import chunk_ends
from trianglemix.runtime.errors import ExecutionError
from trianglemix.runtime.kv_cache import IntArray, KVCache
from trianglemix.runtime.memory import peak_resident_bytes
from trianglemix.runtime.request import Group, Request
from trianglemix.runtime.result import FinishReason, GenerationResult, Token
from trianglemix.runtime.sampling import Sampler
from trianglemix.runtime.tokenizer import TextStream, Tokenizer

_MIB = 2**20


@dataclass
class _Row:
    """What is known of one prompt while its tokens come in."""

    prompt_tokens: int
    stream: TextStream | None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    first_at: float = 0.0
    last_at: float = 0.0

    def add(self, token: int, request: Request) -> str:
        """Takes a token in; returns the text it completes."""
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        self.ids.append(token)
        piece = ""
        if token in request.stop_ids:
            self.finish_reason = "stop"
        elif self.stream is not None:
            piece = self.stream.push(token)
        if self.finish_reason is None and len(self.ids) >= request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.stream is not None:
            piece += self.stream.flush()
        self.text += piece
        return piece


class Generation(Iterator[Token]):
    """Tokens as they come. After the last one, or without waiting, `results()` has the figures."""

    def __init__(
        self,
        groups: Sequence[Group],
        request: Request,
        tokenizer: Tokenizer | None,
        prepared_s: float,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._prepared_s = prepared_s  # spent before the first step, a part of the first token's
        self._results: list[GenerationResult] = []
        self._tokens = self._run_all(groups)

    def __next__(self) -> Token:
        return next(self._tokens)

    def results(self) -> list[GenerationResult]:
        """One result per prompt, in their order; generates what is left first."""
        for _ in self:
            pass
        return self._results

    def result(self) -> GenerationResult:
        """The first prompt's result."""
        return self.results()[0]

    def close(self) -> None:
        """Ends it early: what it has generated stays in its cache, which others may go on from."""
        self._tokens.close()

    def _run_all(self, groups: Sequence[Group]) -> Generator[Token]:
        for group in groups:
            cache = group.open_cache()
            with cache.in_use():
                yield from self._run(group, cache)

    def _run(self, group: Group, cache: KVCache) -> Iterator[Token]:
        started = time.perf_counter() - self._prepared_s
        rows = [
            _Row(len(ids), TextStream(self._tokenizer) if self._tokenizer else None)
            for ids in group.prompts
        ]
        sampler = Sampler(self._request.sampling, group.rows)
        longest = max(len(ids) for ids in group.prompts)
        answer = min(self._request.max_new_tokens, 1024)  # a longer one's cache grows on the way
        cache.reserve(cache.length + cache.pending.shape[1] + longest + answer)
        logits: Logits | None = _prefill(cache, group.prompts, self._request.prefill_chunk)
        prompt_end, chosen = cache.length, []
        while True:
            tokens = sampler.choose(_checked(logits))
            cache.pending = tokens[:, None]
            chosen.append(tokens)
            for number, row, token in zip(group.rows, rows, tokens.tolist(), strict=True):
                if row.finish_reason is None:
                    yield Token(number, token, row.add(token, self._request))
            if all(row.finish_reason for row in rows):
                break
            if cache.ends_at_switch:
                cache = group.open_cache()
                logits = _read_again(cache, group.prompts, chosen)
            else:
                logits = cache.extend(cache.pending, None, prompt_end)
        self._results += [self._result(row, started, cache) for row in rows]

    def _result(self, row: _Row, started: float, cache: KVCache) -> GenerationResult:
        assert row.finish_reason is not None
        decode_s = row.last_at - row.first_at
        return GenerationResult(
            text=row.text,
            ids=tuple(row.ids),
            finish_reason=row.finish_reason,
            prompt_tokens=row.prompt_tokens,
            ttft_s=row.first_at - started,
            tokens_per_s=(len(row.ids) - 1) / decode_s if decode_s > 0 else 0.0,
            peak_rss_mb=peak_resident_bytes() / _MIB,
            kernel=cache.kernel,
            provider=cache.provider,
        )


def _prefill(cache: KVCache, prompts: Sequence[IntArray], chunk: int | None) -> Logits:
    """Puts the prompts into the cache, aligned on the right; returns their last tokens' logits.

    Tokens of an earlier turn that the model has not seen go first.
    """
    earlier = cache.pending.shape[1]
    longest = max(len(ids) for ids in prompts)
    ids = np.zeros((len(prompts), earlier + longest), np.int64)
    real = np.zeros(ids.shape, np.bool_)
    ids[:, :earlier], real[:, :earlier] = cache.pending, True
    for row, prompt in enumerate(prompts):
        ids[row, earlier + longest - len(prompt) :] = prompt
        real[row, earlier + longest - len(prompt) :] = True
    start, prompt_end = cache.length, cache.length + ids.shape[1]
    for end in chunk_ends(start, prompt_end, chunk, cache.first_tile_slot(real)):
        part = slice(cache.length - start, end - start)
        is_last = end == prompt_end
        logits = cache.extend(ids[:, part], real[:, part], prompt_end, want_logits=is_last)
        cache.pending = cache.pending[:, :0]
    assert logits is not None
    return logits


def _read_again(cache: KVCache, prompts: Sequence[IntArray], chosen: Sequence[IntArray]) -> Logits:
    """Puts prompts of one length and their answers so far into an empty cache, in one step.

    As transformers does where a text passes the length at which a model rotates otherwise: keys
    from before are not those of the longer text.
    """
    texts = np.concatenate([np.stack(list(prompts)), np.stack(chosen, axis=1)], axis=1)
    logits = cache.extend(texts, None, len(prompts[0]))
    assert logits is not None
    cache.pending = texts[:, :0]
    return logits


def _checked(logits: Logits | None) -> Logits:
    """The logits, unless one is NaN: then any choice would be noise."""
    assert logits is not None
    if np.isnan(logits.max()):
        raise ExecutionError(
            "the model's logits hold NaN; its numbers overflow in this type: export it in float32 "
            "or bfloat16"
        )
    return logits
