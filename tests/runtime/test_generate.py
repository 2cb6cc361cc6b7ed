"""Generated tokens are those of a run without cache, chunks or batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime import GREEDY, Sampling, TriangleSession
from trianglemix.runtime.errors import PromptError

from tests.runtime.conftest import FolderMaker, prompt
from tests.runtime.oracle import Oracle
from tests.runtime.tiny_folder import PATTERN, TinyFolder

LONG = 60  # far beyond sink + window + last
assert PATTERN.exact_length is not None
assert 2 * PATTERN.exact_length < LONG

KINDS = {
    "shared cache": TinyFolder(),
    "growing cache": TinyFolder(shared_cache=False),
    "logits of all positions": TinyFolder(last_token_logits=False),
    "no position_ids": TinyFolder(position_ids=False),
    "no prompt_length": TinyFolder(prompt_length=False),
    "dense twin": TinyFolder(group_query_attention=True),
}


def _session(folder: Path) -> TriangleSession:
    return TriangleSession.from_folder(folder, provider="cpu", threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_a_run_without_cache(kind: str, make_folder: FolderMaker) -> None:
    folder = make_folder(KINDS[kind])
    session, oracle = _session(folder), Oracle(folder)
    if kind == "no prompt_length":  # then only the whole prompt's own end is known
        ids = prompt(LONG)
        first = int(np.argmax(oracle.step(ids, 0)[0]))
        assert session.generate(ids, 1).ids == (first,)
        return
    for length in (1, 7, LONG):
        ids = prompt(length)
        result = session.generate(ids, 10)
        assert list(result.ids) == oracle.tokens(ids, 10)
        assert result.kernel == "native"
        assert result.prompt_tokens == length


def test_float16_cache_and_logits(make_folder: FolderMaker) -> None:
    session = _session(make_folder(TinyFolder(dtype="float16")))
    whole = session.generate(prompt(LONG), 12)
    assert len(set(whole.ids)) > 3
    assert session.generate(prompt(LONG), 12, prefill_chunk=16).ids == whole.ids


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 59, 60, 1000])
@pytest.mark.parametrize("shared_cache", [True, False])
def test_chunks_give_the_tokens_of_one_pass(
    chunk: int, shared_cache: bool, make_folder: FolderMaker
) -> None:
    session = _session(make_folder(TinyFolder(shared_cache=shared_cache)))
    whole = session.generate(prompt(LONG), 12)
    assert session.generate(prompt(LONG), 12, prefill_chunk=chunk).ids == whole.ids


def test_chunk_logits_are_those_of_one_pass(session: TriangleSession) -> None:
    ids = np.array([prompt(LONG)], np.int64)
    whole = session.new_cache().extend(ids, None, LONG)
    chunked = session.new_cache()
    for begin in range(0, LONG, 13):
        logits = chunked.extend(ids[:, begin : begin + 13], None, LONG)
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    forgetful = session.new_cache()  # each chunk taken for the prompt's end: another answer
    for begin in range(0, LONG, 13):
        other = forgetful.extend(ids[:, begin : begin + 13], None, min(begin + 13, LONG))
    assert np.abs(np.asarray(other) - np.asarray(whole)).max() > 1e-2


def test_chunks_need_a_prompt_length(make_folder: FolderMaker) -> None:
    session = _session(make_folder(KINDS["no prompt_length"]))
    with pytest.raises(ValueError, match="no prompt_length input"):
        session.generate(prompt(LONG), 4, prefill_chunk=16)
    assert session.generate(prompt(10), 4, prefill_chunk=16).prompt_tokens == 10


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("kind", ["shared cache", "growing cache", "dense twin"])
def test_rows_of_a_batch_equal_themselves_alone(
    kind: str, chunk: int | None, make_folder: FolderMaker
) -> None:
    session = _session(make_folder(KINDS[kind]))
    prompts = [prompt(length, seed=length) for length in (LONG, 1, 23, 47)]
    results = session.generate(prompts, 10, prefill_chunk=chunk)
    assert [result.ids for result in results] == [session.generate(p, 10).ids for p in prompts]
    assert [result.prompt_tokens for result in results] == [LONG, 1, 23, 47]


def test_dense_twin_batches_prompts_of_one_length(make_folder: FolderMaker) -> None:
    session = _session(make_folder(KINDS["dense twin"]))
    prompts = [prompt(31, seed) for seed in range(3)]
    rows = [token.row for token in session.stream(prompts, 2)]
    assert rows == [0, 1, 2, 0, 1, 2]  # together, not in turn
    results = session.generate(prompts, 6)
    assert [result.ids for result in results] == [session.generate(p, 6).ids for p in prompts]


def test_sampled_rows_equal_themselves_alone(session: TriangleSession) -> None:
    prompts = [prompt(length) for length in (9, 33)]
    sampling = Sampling(temperature=1.5, top_k=50, seed=5)
    results = session.generate(prompts, 12, sampling=sampling)
    for row, (ids, result) in enumerate(zip(prompts, results, strict=True)):
        alone = session.generate(ids, 12, sampling=replace(sampling, seed=5 + row))
        assert alone.ids == result.ids
    assert results[0].ids != session.generate(prompts[0], 12, sampling=GREEDY).ids


def test_stops_after_a_stop_token(session: TriangleSession) -> None:
    ids = session.generate(prompt(LONG), 10).ids
    stop = ids[3]
    session.stop_ids = frozenset({stop})
    result = session.generate(prompt(LONG), 10)
    assert result.ids == ids[: ids.index(stop) + 1]
    assert result.finish_reason == "stop"
    assert session.tokenizer is not None
    assert result.text == session.tokenizer.decode(result.ids[:-1])


def test_rows_stop_on_their_own(session: TriangleSession) -> None:
    prompts = [prompt(40, seed) for seed in range(3)]
    free = [result.ids for result in session.generate(prompts, 10)]
    stop = free[1][2]
    session.stop_ids = frozenset({stop})
    for ids, result in zip(free, session.generate(prompts, 10), strict=True):
        end = ids.index(stop) + 1 if stop in ids else 10
        assert result.ids == ids[:end]
        assert result.finish_reason == ("stop" if stop in ids else "length")


def test_stop_tokens_come_from_the_folder(make_folder: FolderMaker, folder: Path) -> None:
    ids = _session(folder).generate(prompt(20), 8).ids
    stopping = _session(make_folder(TinyFolder(eos=ids[1])))
    assert stopping.stop_ids == {ids[1]}
    assert stopping.generate(prompt(20), 8).finish_reason == "stop"


def test_tokens_stream_before_the_end(session: TriangleSession) -> None:
    stream = session.stream("A prompt of a few words", 12)
    first = next(stream)
    result = stream.result()
    assert first.id == result.ids[0]
    tokens = list(session.stream("A prompt of a few words", 12))
    assert tuple(token.id for token in tokens) == result.ids
    assert "".join(token.text for token in tokens) == result.text


def test_streaming_runs_no_further_than_asked(session: TriangleSession) -> None:
    cache = session.new_cache()
    stream = session.stream(prompt(10), 12, cache=cache)
    next(stream)
    assert cache.length == 10  # the prompt, and no step beyond the token that was asked for


def test_figures(session: TriangleSession) -> None:
    result = session.generate(prompt(LONG), 10)
    assert 0 < result.ttft_s < 10
    assert result.tokens_per_s > 1
    assert 10 < result.peak_rss_mb < 24_000
    assert result.provider == "cpu"
    assert session.generate(prompt(LONG), 1).tokens_per_s == 0.0


def test_text_and_its_ids_are_one_prompt(session: TriangleSession) -> None:
    assert session.tokenizer is not None
    text = "Grüße, wie geht es?"
    ids = session.tokenizer.encode(text)
    assert session.generate(text, 5).ids == session.generate(ids, 5).ids
    assert session.generate(np.array(ids), 5).ids == session.generate(ids, 5).ids


def test_a_text_without_tokens(session: TriangleSession, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.tokenizer is not None
    monkeypatch.setattr(session.tokenizer, "encode", lambda text: [])
    with pytest.raises(PromptError, match="has no tokens for this text"):
        session.generate("\u20ac", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": np.zeros((2, 2), np.int64)}, "not usable"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": [1], "prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prompt": prompt(500), "max_new_tokens": 13}, "make 513, but the context has 512"),
    ],
)
def test_bad_arguments(session: TriangleSession, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.generate(**arguments)


def test_the_whole_context_can_be_used(session: TriangleSession) -> None:
    assert len(session.generate(prompt(500), 12).ids) == 12


def test_unknown_token_is_one_line(session: TriangleSession) -> None:
    with pytest.raises(Exception, match="has the token id 100000") as caught:
        session.generate([100_000], 1)
    assert "\n" not in str(caught.value)


def test_fixture_says_what_it_is(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.triangle_layers == (1, 2)
    assert manifest.shared_cache
    assert manifest.left_padding
