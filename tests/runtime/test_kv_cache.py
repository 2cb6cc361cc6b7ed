"""The cache is written in place, grows without losing tokens, and carries a conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from trianglemix.manifest.feeds import Call
from trianglemix.runtime import KVCache, TriangleSession
from trianglemix.runtime.backends.backend import Logits
from trianglemix.runtime.backends.ort_cache import GrowingCache, SharedCache
from trianglemix.runtime.errors import ExecutionError, PromptError

from tests.runtime.conftest import FolderMaker, prompt
from tests.runtime.oracle import Oracle
from tests.runtime.tiny_folder import TinyFolder


def _shared(cache: KVCache) -> SharedCache:
    assert isinstance(cache._device, SharedCache)
    return cache._device


def test_shared_buffers_stay_where_they_are(session: TriangleSession) -> None:
    cache = session.new_cache(max_length=200)
    session.generate(prompt(50), 5, cache=cache)
    buffers = _shared(cache).buffers
    assert len(buffers) == 6
    before = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    held = {name: buffer.numpy()[:, :, :50].copy() for name, buffer in buffers.items()}
    session.generate(prompt(60), 20, cache=cache)
    after = _shared(cache).buffers
    assert {name: buffer.data_ptr() for name, buffer in after.items()} == before
    for name, buffer in after.items():
        assert buffer.shape()[2] == 200
        np.testing.assert_array_equal(buffer.numpy()[:, :, :50], held[name])
        assert np.abs(buffer.numpy()[:, :, 50 : cache.length]).min() > 0  # the new ones are there
    assert cache.length == 50 + 5 + 60 + 19


def test_growth_keeps_the_tokens(session: TriangleSession) -> None:
    ids = np.array([prompt(300)], np.int64)
    roomy, grown = session.new_cache(max_length=300), session.new_cache()
    for cache in (roomy, grown):
        for begin in range(0, 300, 25):
            logits = cache.extend(ids[:, begin : begin + 25], None, 300)
        if cache is roomy:
            expected = logits
    assert _shared(roomy).slots == 300
    assert 300 <= _shared(grown).slots < 450
    assert {b.shape()[2] for b in _shared(grown).buffers.values()} == {_shared(grown).slots}
    np.testing.assert_array_equal(logits, expected)


def test_growing_cache_holds_no_more_than_its_tokens(make_folder: FolderMaker) -> None:
    folder = make_folder(TinyFolder(shared_cache=False))
    session = TriangleSession.from_folder(folder, provider="cpu", threads=1)
    cache = session.new_cache()
    session.generate(prompt(33), 4, cache=cache)
    assert isinstance(cache._device, GrowingCache)
    assert cache.length == 33 + 3
    assert cache.pending.shape == (1, 1)


@pytest.mark.parametrize("shared_cache", [True, False])
@pytest.mark.parametrize("chunk", [None, 9])
def test_second_turn(shared_cache: bool, chunk: int | None, make_folder: FolderMaker) -> None:
    folder = make_folder(TinyFolder(shared_cache=shared_cache))
    session, oracle = TriangleSession.from_folder(folder, "cpu", threads=1), Oracle(folder)
    turns = [prompt(50, seed=1), prompt(45, seed=2), prompt(3, seed=3)]
    cache = session.new_cache()
    past, unseen = None, []
    for turn in turns:
        result = session.generate(turn, 6, cache=cache, prefill_chunk=chunk)
        logits, past = oracle.step(unseen + turn, 0, past)  # 0: the turn ends where its keys end
        expected = [int(np.argmax(logits))]
        for _ in range(5):
            logits, past = oracle.step(expected[-1:], 0, past)
            expected.append(int(np.argmax(logits)))
        assert list(result.ids) == expected
        unseen = expected[-1:]


def test_a_failed_chunk_leaves_the_earlier_ones(
    session: TriangleSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = session.new_cache(max_length=200)
    session.generate(prompt(10), 3, cache=cache)
    shared, step, calls = _shared(cache), _shared(cache).step, []

    def fail_the_second_time(call: Call, want_logits: bool) -> Logits | None:
        calls.append(call)
        if len(calls) == 2:
            raise ExecutionError("out of luck")
        return step(call, want_logits)

    monkeypatch.setattr(shared, "step", fail_the_second_time)
    with pytest.raises(ExecutionError):
        session.generate(prompt(30), 3, cache=cache, prefill_chunk=16)
    assert cache.length == 12 + 16
    assert cache.pending.shape == (1, 0)  # the first chunk took it in


def test_second_turn_sees_the_first(session: TriangleSession) -> None:
    cache = session.new_cache()
    session.generate(prompt(50), 6, cache=cache)
    continued = session.generate(prompt(20), 6, cache=cache)
    assert continued.ids != session.generate(prompt(20), 6).ids
    assert continued.prompt_tokens == 20


def test_max_length_is_a_limit(session: TriangleSession) -> None:
    cache = session.new_cache(max_length=64)
    session.generate(prompt(40), 4, cache=cache)
    with pytest.raises(ValueError, match=r"44 tokens before, 20 prompt tokens.*context has 64"):
        session.generate(prompt(20), 4, cache=cache)
    assert cache.length == 43
    assert len(session.generate(prompt(16), 4, cache=cache).ids) == 4


def test_context_is_a_limit_over_turns(session: TriangleSession) -> None:
    cache = session.new_cache()
    session.generate(prompt(400), 4, cache=cache)
    with pytest.raises(ValueError, match="context has 512"):
        session.generate(prompt(120), 4, cache=cache)


def test_a_cache_takes_one_prompt(session: TriangleSession) -> None:
    with pytest.raises(ValueError, match="continues one conversation"):
        session.generate([[1, 2], [3]], 2, cache=session.new_cache())
    with pytest.raises(ValueError, match="max_length is 0"):
        session.new_cache(max_length=0)


def test_unlimited_context(make_folder: FolderMaker, tmp_path: Path) -> None:
    folder = make_folder(TinyFolder(context_length=None))
    session = TriangleSession.from_folder(folder, provider="cpu", threads=1)
    cache = session.new_cache()
    assert cache.limit is None
    assert len(session.generate(prompt(100), 40, cache=cache).ids) == 40


def test_a_cache_of_another_session(folder: Path, session: TriangleSession) -> None:
    other = TriangleSession.from_folder(folder, "cpu", threads=1)
    cache = other.new_cache()
    with pytest.raises(PromptError, match="made by another session"):
        session.generate(prompt(20), 2, cache=cache)
    assert other.generate(prompt(20), 2, cache=cache).ids == session.generate(prompt(20), 2).ids


def test_two_generations_on_one_cache(session: TriangleSession) -> None:
    cache = session.new_cache()
    first = session.stream(prompt(20), 8, cache=cache)
    begun = next(first)
    second = session.stream(prompt(9, 1), 8, cache=cache)
    with pytest.raises(PromptError, match="has not ended; finish or close"):
        next(second)
    first.close()
    alone = session.new_cache()
    session.generate(prompt(20), 1, cache=alone)
    expected = session.generate(prompt(9, 1), 8, cache=alone).ids
    assert session.generate(prompt(9, 1), 8, cache=cache).ids == expected
    assert begun.id == session.generate(prompt(20), 1).ids[0]
