"""Models with block-sparse layers: chunks are whole tiles, and give what one pass gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.backends.backend import Logits
from trianglemix.runtime.chunks import chunk_ends
from trianglemix.runtime.kv_cache import KVCache

from tests.runtime.conftest import FolderMaker, prompt
from tests.runtime.tiny_folder import TinyFolder

LONG: Final = 1100
LENGTHS: Final = (LONG, LONG - 3 * 128, LONG - 77)


@pytest.fixture
def session(make_folder: FolderMaker) -> TriangleSession:
    folder: Path = make_folder(TinyFolder(block_sparse=True))
    return TriangleSession.from_folder(folder, provider="cpu", threads=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, and the slots that each call of a prompt begins and ends at."""
    seen: list[tuple[int, int, int]] = []
    extend = KVCache.extend

    def noted(cache: KVCache, ids: Any, *arguments: Any, **named: Any) -> Logits | None:
        if ids.shape[1] > 1:
            seen.append((len(ids), cache.length, cache.length + ids.shape[1]))
        return extend(cache, ids, *arguments, **named)

    monkeypatch.setattr(KVCache, "extend", noted)
    return seen


@given(
    st.integers(0, 300), st.integers(1, 900), st.one_of(st.none(), st.integers(1, 500)),
    st.one_of(st.none(), st.integers(0, 300)),
)  # fmt: skip
def test_ends_rise_to_the_last_slot_along_the_tiles(
    begin: int, length: int, chunk: int | None, first: int | None
) -> None:
    ends = chunk_ends(begin, begin + length, chunk, first)
    sizes = np.diff([begin, *ends])
    assert ends[-1] == begin + length
    assert (sizes > 0).all()
    if chunk is not None:
        assert sizes.max() <= (chunk if first is None else max(chunk, 128))
        assert first is None or all((end - first) % 128 == 0 for end in ends[:-1])


@pytest.mark.parametrize("chunk", [1, 128, 200, 300, 1024, 5000])
def test_chunks_give_the_answer_of_one_pass(
    chunk: int, session: TriangleSession, calls: list[tuple[int, int, int]]
) -> None:
    whole = session.generate(prompt(LONG), 8)
    calls.clear()
    assert session.generate(prompt(LONG), 8, prefill_chunk=chunk).ids == whole.ids
    assert len(calls) > 1 or chunk > LONG
    assert all(begin % 128 == 0 for _, begin, _ in calls)


def test_a_cut_tile_would_be_another_answer(session: TriangleSession) -> None:
    """What the runtime guards against: chunks that cut tiles give other logits than one pass."""
    ids = np.array([prompt(LONG)], np.int64)

    def logits(*ends: int) -> Any:
        cache, begin, result = session.new_cache(), 0, None
        for end in ends:
            result = cache.extend(ids[:, begin:end], None, LONG)
            begin = end
        return np.asarray(result)

    whole = logits(LONG)
    np.testing.assert_allclose(logits(256, 640, LONG), whole, atol=1e-4)
    assert np.abs(logits(300, 700, LONG) - whole).max() > 1e-2


@pytest.mark.parametrize("first_turn", [40, 200, 700])
def test_a_second_turn_is_cut_on_its_rows_tiles(
    first_turn: int, session: TriangleSession, calls: list[tuple[int, int, int]]
) -> None:
    answers = []
    for chunk in (None, 256):
        cache = session.new_cache()
        session.generate(prompt(first_turn), 5, cache=cache)
        calls.clear()
        later = session.generate(prompt(LONG, seed=7), 8, prefill_chunk=chunk, cache=cache)
        answers.append(later.ids)
    assert answers[0] == answers[1]
    assert len(calls) > 1
    assert all(begin % 128 == 0 for _, begin, _ in calls[1:])


def test_rows_whose_tiles_agree_are_read_together(
    session: TriangleSession, calls: list[tuple[int, int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    for lengths, together in ((LENGTHS[:2], True), (LENGTHS, False)):
        prompts = [prompt(length, seed=length) for length in lengths]
        alone = [session.generate(ids, 6).ids for ids in prompts]
        calls.clear()
        with caplog.at_level(logging.INFO):
            results = session.generate(prompts, 6, prefill_chunk=256)
        assert [result.ids for result in results] == alone
        assert {rows for rows, *_ in calls} == {len(prompts) if together else 1}
    assert "whole tiles of one row cut those of another" in caplog.text
    calls.clear()
    session.generate([prompt(length) for length in LENGTHS], 2)
    assert calls[0][0] == len(LENGTHS), "one pass needs no chunks, and no turns"


def test_other_models_are_cut_as_before(
    make_folder: FolderMaker, calls: list[tuple[int, int, int]]
) -> None:
    session = TriangleSession.from_folder(make_folder(TinyFolder()), provider="cpu", threads=1)
    session.generate([prompt(60), prompt(31)], 2, prefill_chunk=16)
    assert calls == [(2, begin, min(60, begin + 16)) for begin in range(0, 60, 16)]
