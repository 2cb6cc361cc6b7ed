"""vLLM with block-sparse layers answers as `trianglemix.pytorch.patch` does, tile by tile.

Where steps begin on tiles' edges that is the answer of one pass. Where they cut a tile it is the
answer of the same calls by hand, in which the cut tile is dense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from tests.vllm_plugin.served_models import (
    BLOCK_LAYERS,
    BLOCKS_SECTION,
    FAMILIES,
    RULE,
    check,
    expected,
    expected_after_hit,
    expected_in_chunks,
    needs_vllm,
    prompt,
    run_engine,
    sparse_rows,
)

pytestmark = needs_vllm
TOKENS: Final = 8
LENGTHS: Final = (1, 200, 201, 391, 392, 1000)
"""Dense are prompts of up to 200 tokens; those of up to 391 keep every block."""
WHOLE_TILES: Final = (128, 384)
CUT_TILES: Final = (100, 300)
MIXED: Final = ((1000, 1), (90, 2), (600, 3), (300, 4))


def _round(prompts: list[tuple[int, ...]], budget: int | None = None) -> dict[str, Any]:
    return {"prompts": prompts, "tokens": TOKENS, "budget": budget}


@pytest.fixture(scope="module", params=FAMILIES)
def answered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """One engine: each prompt alone, the longest in chunks, all kinds at once."""
    rounds = [_round([prompt(length)], 2048) for length in LENGTHS]
    rounds += [_round([prompt(1000)], budget) for budget in (*WHOLE_TILES, *CUT_TILES)]
    rounds += [_round([prompt(*p) for p in MIXED], budget) for budget in (2048, 256)]
    work = tmp_path_factory.mktemp("engine") / request.param
    return request.param, run_engine(request.param, rounds, work, BLOCKS_SECTION)


@pytest.mark.parametrize("length", LENGTHS)
def test_whole_prompts(answered: tuple[str, dict[str, Any]], length: int) -> None:
    family, result = answered
    (found,) = result["rounds"][LENGTHS.index(length)]
    check(found, expected(family, prompt(length), TOKENS, "blocks"))


@pytest.mark.parametrize("budget", WHOLE_TILES)
def test_chunks_of_whole_tiles(answered: tuple[str, dict[str, Any]], budget: int) -> None:
    family, result = answered
    (found,) = result["rounds"][len(LENGTHS) + WHOLE_TILES.index(budget)]
    assert found["starts"] == list(range(0, 1000, budget))
    check(found, expected(family, prompt(1000), TOKENS, "blocks"))


@pytest.mark.parametrize("budget", CUT_TILES)
def test_chunks_that_cut_tiles(answered: tuple[str, dict[str, Any]], budget: int) -> None:
    family, result = answered
    (found,) = result["rounds"][len(LENGTHS) + len(WHOLE_TILES) + CUT_TILES.index(budget)]
    assert found["starts"] == list(range(0, 1000, budget))
    check(found, expected_in_chunks(family, prompt(1000), found["starts"], TOKENS, "blocks"))
    whole = expected(family, prompt(1000), TOKENS, "blocks")
    assert abs(found["logs"][0] - whole.logs[0]) > 1e-3, "no cut tile was seen"


@pytest.mark.parametrize("number", [-2, -1], ids=["at once", "in steps of 256"])
def test_prompts_and_answers_mixed(answered: tuple[str, dict[str, Any]], number: int) -> None:
    """Answers of others take rows of a step, so that steps of 256 cut tiles too."""
    family, result = answered
    for found, given in zip(result["rounds"][number], MIXED, strict=True):
        ids = prompt(*given)
        check(found, expected_in_chunks(family, ids, found["starts"], TOKENS, "blocks"))
    starts = [start for found in result["rounds"][number] for start in found["starts"]]
    assert any(start % 128 for start in starts) is (number == -1)


def test_the_rule_is_what_was_served(answered: tuple[str, dict[str, Any]]) -> None:
    """The dense model answers otherwise, and so does the one with its triangle layer alone."""
    family, result = answered
    (found,) = result["rounds"][LENGTHS.index(1000)]
    for other in ("dense", "triangle"):
        answer = expected(family, prompt(1000), TOKENS, other)
        assert abs(found["logs"][0] - answer.logs[0]) > 1e-2


def test_rows_are_counted(answered: tuple[str, dict[str, Any]]) -> None:
    _, result = answered
    mixed = [length for length, _ in MIXED]
    lengths = [*([length] for length in LENGTHS), *[[1000]] * 4, mixed, mixed]
    sparse = dense = 0
    for answers, given in zip(result["rounds"], lengths, strict=True):
        for found, length in zip(answers, given, strict=True):
            ours = sparse_rows(found["starts"], length, RULE)
            sparse += ours
            dense += length - ours + TOKENS - 1  # the last token of an answer is never read
    for layer in BLOCK_LAYERS:
        assert result["counts"][str(layer)] == {"block_sparse": sparse, "dense": dense}
    assert set(result["counts"]["2"]) == {"triangle", "dense"}


def test_prefix_hits(tmp_path: Path) -> None:
    """A hit that ends inside a tile makes the rest of that tile dense."""
    earlier, longer = prompt(500), prompt(1000)
    rounds = [_round([earlier]), _round([longer])]
    result = run_engine("qwen3", rounds, tmp_path, BLOCKS_SECTION, enable_prefix_caching=True)
    (first,), (after,) = result["rounds"]
    check(first, expected("qwen3", earlier, TOKENS, "blocks"))
    assert (after["cached"], after["starts"]) == (480, [480])
    check(after, expected_after_hit("qwen3", longer, 480, 500, TOKENS, "blocks"))


def test_prefix_hits_on_pages_of_whole_tiles(tmp_path: Path) -> None:
    """The rest of the prompt begins on a tile's edge: the answer of one pass."""
    earlier, longer = prompt(500), prompt(1000)
    rounds = [_round([earlier]), _round([longer])]
    result = run_engine(
        "llama", rounds, tmp_path, BLOCKS_SECTION, enable_prefix_caching=True, block_size=128
    )
    (after,) = result["rounds"][1]
    assert (after["cached"], after["starts"]) == (384, [384])
    check(after, expected("llama", longer, TOKENS, "blocks"))


def test_a_hit_of_the_same_prompt_changes_nothing(tmp_path: Path) -> None:
    """What is read again are last rows, which were dense before."""
    rounds = [_round([prompt(1000)]), _round([prompt(1000)])]
    result = run_engine("llama", rounds, tmp_path, BLOCKS_SECTION, enable_prefix_caching=True)
    for (found,), cached in zip(result["rounds"], (0, 992), strict=True):
        assert found["cached"] == cached
        check(found, expected("llama", prompt(1000), TOKENS, "blocks"))
