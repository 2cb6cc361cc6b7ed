"""vLLM with the plug-in answers as `trianglemix.pytorch.patch` does, however a prompt arrives.

It runs in an environment of its own, which `make vllm` makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from tests.vllm_plugin.served_models import (
    FAMILIES,
    LAYERS,
    PATTERN,
    SECTION,
    check,
    expected,
    expected_after_hit,
    needs_vllm,
    prompt,
    run_engine,
)

pytestmark = needs_vllm
TOKENS: Final = 8
LENGTHS: Final = (1, 2, 35, 36, 37, 64, 501)
"""Nothing is dropped up to 36 = 4 + 24 + 8 tokens."""
BUDGETS: Final = (7, 32, 300)
MIXED: Final = ((501, 1), (90, 2), (333, 3), (37, 4))


def _round(prompts: list[tuple[int, ...]], budget: int | None = None) -> dict[str, Any]:
    return {"prompts": prompts, "tokens": TOKENS, "budget": budget}


@pytest.fixture(scope="module", params=FAMILIES)
def answered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """One engine: each prompt alone, the longest in chunks, all kinds at once in small steps."""
    rounds = [_round([prompt(length)], 2048) for length in LENGTHS]
    rounds += [_round([prompt(501)], budget) for budget in BUDGETS]
    rounds += [_round([prompt(*p) for p in MIXED], budget) for budget in (2048, 64)]
    work = tmp_path_factory.mktemp("engine") / request.param
    return request.param, run_engine(request.param, rounds, work)


@pytest.mark.parametrize("length", LENGTHS)
def test_whole_prompts(answered: tuple[str, dict[str, Any]], length: int) -> None:
    family, result = answered
    (found,) = result["rounds"][LENGTHS.index(length)]
    check(found, expected(family, prompt(length), TOKENS))


@pytest.mark.parametrize("budget", BUDGETS)
def test_chunks(answered: tuple[str, dict[str, Any]], budget: int) -> None:
    family, result = answered
    (found,) = result["rounds"][len(LENGTHS) + BUDGETS.index(budget)]
    check(found, expected(family, prompt(501), TOKENS))


@pytest.mark.parametrize("number", [-2, -1], ids=["at once", "in steps of 64"])
def test_prompts_and_answers_mixed(answered: tuple[str, dict[str, Any]], number: int) -> None:
    family, result = answered
    for found, given in zip(result["rounds"][number], MIXED, strict=True):
        check(found, expected(family, prompt(*given), TOKENS))


def test_the_pattern_is_what_was_served(answered: tuple[str, dict[str, Any]]) -> None:
    """The dense model answers otherwise, and the layers say how many rows streamed."""
    family, result = answered
    dense = expected(family, prompt(501), TOKENS, "dense")
    (found,) = result["rounds"][LENGTHS.index(501)]
    assert abs(found["logs"][0] - dense.logs[0]) > 1e-2
    span = PATTERN.num_sink_tokens + PATTERN.sliding_window_size
    lengths = [
        *LENGTHS,
        *[501] * len(BUDGETS),
        *(length for length, _ in MIXED),
        *(length for length, _ in MIXED),
    ]
    streaming = sum(max(0, n - PATTERN.num_last_tokens - span) for n in lengths)
    decoded = (TOKENS - 1) * len(lengths)  # the last token of an answer is never read
    assert result["counts"] == {
        str(layer): {"triangle": streaming, "dense": sum(lengths) + decoded - streaming}
        for layer in LAYERS
    }


def test_without_a_section_the_engine_is_vllm_s(tmp_path: Path) -> None:
    """The same bits as without the plug-in; with it, short prompts too are the same bits."""
    rounds = [_round([prompt(36)]), _round([prompt(501)])]
    alone = run_engine("llama", rounds, tmp_path / "alone", None, {"VLLM_PLUGINS": "none"})
    idle = run_engine("llama", rounds, tmp_path / "idle", None)
    off = run_engine(
        "llama", rounds, tmp_path / "off", environment={"VLLM_TRIANGLEMIX_ENABLED": "0"}
    )
    served = run_engine("llama", rounds, tmp_path / "served")
    assert idle["rounds"] == off["rounds"] == alone["rounds"]
    assert set(idle["layers"].values()) == set(alone["layers"].values())
    assert not idle["counts"]
    assert served["rounds"][0] == alone["rounds"][0]
    assert served["rounds"][1] != alone["rounds"][1]


def test_prefix_hits(tmp_path: Path) -> None:
    """A hit of the same prompt changes nothing; one of a shorter prompt keeps its dense rows."""
    earlier, longer = prompt(200), prompt(501)
    rounds = [_round([earlier]), _round([longer]), _round([longer])]
    result = run_engine("qwen3", rounds, tmp_path, enable_prefix_caching=True)
    (first,), (after,), (again,) = result["rounds"]
    check(first, expected("qwen3", earlier, TOKENS))
    assert (first["cached"], after["cached"]) == (0, 192)
    check(after, expected_after_hit("qwen3", longer, 192, 200, TOKENS))
    # Its own blocks, but for those that were found.
    assert again["cached"] == 480
    check(again, expected_after_hit("qwen3", longer, 192, 200, TOKENS))
    plain = expected("qwen3", longer, TOKENS)
    assert abs(plain.logs[0] - after["logs"][0]) < 0.2  # denser, so near it


def test_a_hit_of_the_same_prompt_changes_nothing(tmp_path: Path) -> None:
    rounds = [_round([prompt(501)]), _round([prompt(501)])]
    result = run_engine("llama", rounds, tmp_path, enable_prefix_caching=True)
    for (found,), cached in zip(result["rounds"], (0, 480), strict=True):
        assert found["cached"] == cached
        check(found, expected("llama", prompt(501), TOKENS))


def test_preempted_requests_are_read_again(tmp_path: Path) -> None:
    """Too few pages for all: some requests lose theirs, and read prompt and answer once more."""
    asked = {"prompts": [prompt(300, seed) for seed in range(4)], "tokens": 48, "budget": None}
    result = run_engine("qwen3", [asked], tmp_path, num_gpu_blocks_override=42)
    assert result["preempted"]
    for found, ids in zip(result["rounds"][0], asked["prompts"], strict=True):
        check(found, expected("qwen3", ids, 48))


def test_guessed_tokens(tmp_path: Path) -> None:
    """A text that repeats itself, so that guesses are right now and then."""
    ids = prompt(40) * 8
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    asked = {"prompts": [ids, prompt(200)], "tokens": 24, "budget": None}
    result = run_engine("qwen3", [asked], tmp_path, speculative_config=guess)
    for found, given in zip(result["rounds"][0], asked["prompts"], strict=True):
        check(found, expected("qwen3", given, 24))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensor_parallel_ranks(family: str, tmp_path: Path) -> None:
    rounds = [_round([prompt(501)]), _round([prompt(*p) for p in MIXED])]
    result = run_engine(
        family, rounds, tmp_path, tensor_parallel_size=2, max_num_batched_tokens=256
    )
    check(result["rounds"][0][0], expected(family, prompt(501), TOKENS))
    for found, given in zip(result["rounds"][1], MIXED, strict=True):
        check(found, expected(family, prompt(*given), TOKENS))
    assert set(result["counts"]) == {str(layer) for layer in LAYERS}


def test_a_compiled_model(tmp_path: Path) -> None:
    rounds = [_round([prompt(501)]), _round([prompt(*p) for p in MIXED])]
    result = run_engine("llama", rounds, tmp_path, enforce_eager=False, max_num_batched_tokens=300)
    check(result["rounds"][0][0], expected("llama", prompt(501), TOKENS))
    for found, given in zip(result["rounds"][1], MIXED, strict=True):
        check(found, expected("llama", prompt(*given), TOKENS))


@pytest.mark.parametrize(
    ("section", "engine", "words"),
    [
        ({"layers": "1,3"}, {}, "trianglemix names layer 3, but the model has 3 layers"),
        ({"layer": "1"}, {}, "has layer, but its keys are"),
        ({}, {}, "no plan is shipped for a model of this shape (3 layers, 4/2 heads of 32"),
        (SECTION, {"kv_cache_dtype": "fp8"}, "the cache is quantised (fp8"),
        (SECTION, {"runner": "pooling", "convert": "embed"}, "run as 'pooling'"),
    ],
)  # fmt: skip
def test_refused_before_the_engine_starts(
    section: dict[str, Any], engine: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError) as caught:
        run_engine("llama", [], tmp_path, section, **engine)
    assert words in str(caught.value)


def test_a_layer_with_a_window_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    from tests.vllm_plugin.served_models import served_folder

    model = served_folder("mistral", sliding_window=64)
    with pytest.raises(AssertionError, match=r"model\.layers\.1\.self_attn\.attn cannot be"):
        run_engine("mistral", [], tmp_path, model=model)
