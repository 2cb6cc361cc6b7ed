"""Log-likelihoods through the runtime are those of the ONNX graph's own logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trianglemix.evaluation.likelihood import FolderScorer
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.kv_cache import KVCache
from trianglemix.runtime.sampling import Sampling
from trianglemix.runtime.session import TriangleSession

from tests.evaluation.onnx_likelihood import (
    BEGINNING,
    CONTEXT,
    TOLERANCE,
    OnnxLikelihood,
    export_small_folder,
)

TEXT = "a number is hidden in a text that is long enough to lose its middle, "
LONG = (TEXT * 6)[:400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small_folder(tmp_path_factory.mktemp("likelihood") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> FolderScorer:
    return FolderScorer(TriangleSession.from_folder(folder, "cpu"))


@pytest.fixture(scope="module")
def onnx(folder: Path) -> OnnxLikelihood:
    return OnnxLikelihood(folder)


@pytest.mark.parametrize("context", ["a", TEXT, LONG], ids=["short", "triangle", "too long"])
def test_a_continuation_follows_a_prompt(
    scorer: FolderScorer, onnx: OnnxLikelihood, context: str
) -> None:
    context = context.rstrip()
    found = scorer.likelihood(context, " is 17")
    expected, greedy = onnx.continuation(context, " is 17")
    assert found.logarithm == pytest.approx(expected, abs=TOLERANCE)
    assert found.greedy == greedy
    dense = onnx.dense_continuation(context, " is 17")
    assert (abs(dense - expected) > 0.05) == (context != "a"), "the middle is dropped, or not"


def test_the_most_likely_continuation_is_greedy(scorer: FolderScorer) -> None:
    prompt = scorer.encode(TEXT)
    best = scorer.session.generate(prompt, 4).ids
    assert scorer.token_likelihood(prompt, best).greedy
    assert not scorer.token_likelihood(prompt, [*best[:-1], best[-1] ^ 1]).greedy


def test_choices_of_one_token_read_their_context_once(
    folder: Path, onnx: OnnxLikelihood, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TriangleSession.from_folder(folder, "cpu")
    opened: list[KVCache] = []
    new_cache = session.new_cache
    monkeypatch.setattr(session, "new_cache", lambda: opened.append(new_cache()) or opened[-1])
    scorer = FolderScorer(session)
    for context, choices, read in (("abc", "xyz", 1), ("abd", "xy", 2), (LONG, "xy", 3)):
        for choice in choices:
            expected, _ = onnx.continuation(context, choice)
            found = scorer.likelihood(context, choice).logarithm
            assert found == pytest.approx(expected, abs=TOLERANCE)
        assert len(opened) == read


def test_blanks_of_the_context_belong_to_the_continuation(scorer: FolderScorer) -> None:
    assert scorer.likelihood("abc ", "def") == scorer.likelihood("abc", " def")


def test_an_empty_context_is_the_beginning_of_a_text(
    scorer: FolderScorer, onnx: OnnxLikelihood
) -> None:
    expected = onnx.window([BEGINNING, *onnx.encode("ab")], onnx.encode("abc"))
    assert scorer.likelihood("", "abc").logarithm == pytest.approx(expected, abs=TOLERANCE)


def test_a_whole_text_is_a_prompt(scorer: FolderScorer, onnx: OnnxLikelihood) -> None:
    """Its middle is dropped, as when a user reads it in; as a continuation it would be dense."""
    ids = onnx.encode(TEXT)
    expected = onnx.window([BEGINNING, *ids[:-1]], ids)
    assert scorer.rolling(TEXT) == pytest.approx(expected, abs=TOLERANCE)
    assert abs(scorer.token_likelihood([BEGINNING], ids).logarithm - expected) > 0.05
    assert scorer.rolling("") == 0.0


def test_long_texts_go_in_full_windows(scorer: FolderScorer, onnx: OnnxLikelihood) -> None:
    """Each token once; the last window is filled up with text scored before."""
    read = [BEGINNING, *onnx.encode(LONG)]
    windows = ((CONTEXT, CONTEXT), (2 * CONTEXT, CONTEXT), (len(LONG), len(LONG) - 2 * CONTEXT))
    expected = sum(
        onnx.window(read[end - CONTEXT : end], read[end - scored + 1 : end + 1])
        for end, scored in windows
    )
    assert scorer.rolling(LONG) == pytest.approx(expected, abs=TOLERANCE)


def test_a_continuation_longer_than_the_context_is_refused(scorer: FolderScorer) -> None:
    fits = scorer.likelihood("a", "b" * CONTEXT)
    assert fits.logarithm < 0
    with pytest.raises(PromptError, match=f"{CONTEXT + 1} tokens, but the context has {CONTEXT}"):
        scorer.likelihood("a", "b" * (CONTEXT + 1))


def test_a_model_that_cannot_tell_where_a_prompt_ends_scores_no_whole_text(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"prompt_length": None}), encoding="utf-8")
    scorer = FolderScorer(TriangleSession.from_folder(tmp_path / "other", "cpu"))
    with pytest.raises(PromptError, match="no prompt_length input"):
        scorer.rolling(TEXT)


def test_the_beginning_of_a_text_is_not_doubled(folder: Path, tmp_path: Path) -> None:
    """A chat template spells out the token that some tokenizers add by themselves."""
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGINNING], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    adding = FolderScorer(TriangleSession.from_folder(tmp_path / "other", "cpu"))
    ids = adding.encode("abc")
    assert (len(ids), ids[0]) == (4, BEGINNING)
    assert adding.encode("<s>abc") == ids
    plain = FolderScorer(TriangleSession.from_folder(folder, "cpu"))
    assert adding.rolling(TEXT) == plain.rolling(TEXT)
    assert adding.likelihood("", "abc") == plain.likelihood("", "abc")


def test_answers_end_before_what_stops_them(scorer: FolderScorer, onnx: OnnxLikelihood) -> None:
    answer = onnx.answer(TEXT, 12)
    assert scorer.generate(TEXT, (), 12) == answer
    late, early = answer[5], answer[2:4]
    stopped = scorer.generate(TEXT, (late, early, ""), 12)
    assert stopped == answer[: min(answer.index(late), answer.index(early))]
    longest = scorer.generate(LONG, (), 10 * CONTEXT)  # one token of the prompt is left
    assert longest == onnx.answer(LONG, CONTEXT - 1)


def test_answers_may_be_drawn(scorer: FolderScorer) -> None:
    drawn = {scorer.generate(TEXT, (), 8, Sampling(temperature=2.0, seed=s)) for s in range(4)}
    assert len(drawn) > 1
