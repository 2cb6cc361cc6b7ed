"""docs/block_sparse.md says what the command line, the rule and the shipped plan are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from trianglemix.custom_ops.block_sparse.contract import SAMPLE_STEP, TILE, BlockRule
from trianglemix.exporter import cli
from trianglemix.exporter.layers.block_choice import SCORES_SHARE
from trianglemix.exporter.layers.plan import Plan

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs" / "block_sparse.md").read_text(encoding="utf-8")


def test_options_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.*?) \|", PAGE, re.MULTILINE)
    shown = {
        option: str(parameter.show_default)
        for parameter in cli.command.params
        for option in parameter.opts
        if hasattr(parameter, "show_default")
    }
    assert [option for option, _ in rows] == ["--block-sparse-layers", "--mass", "--min-length"]
    for option, default in rows:
        assert shown[option] == default
    assert f"else {BlockRule().mass}" in dict(rows)["--mass"]
    assert dict(rows)["--min-length"] == f"the plan's, else {BlockRule().min_length}"


def test_the_numbers_of_the_rule() -> None:
    rule = BlockRule()
    assert f"tiles of {TILE} rows, and the keys into blocks of {TILE}" in PAGE
    assert f"(every {SAMPLE_STEP}th)" in PAGE
    assert f"The last {rule.num_last_tokens} rows" in PAGE
    assert rule.sliding_window_size == TILE, "the tile's own block and the one before it"
    assert f"and 1/{round(1 / SCORES_SHARE)} for" in PAGE


@pytest.mark.parametrize(("tokens", "words"), [(4000, "keep {} of their"), (8000, "and {} at")])
def test_the_densities_are_those_of_the_shipped_plan(tokens: int, words: str) -> None:
    section = Plan.load(ROOT / "models" / "smollm2" / "plan.json").block_sparse
    assert section is not None
    kept = [section.densities[tokens][layer] for layer in section.layers]
    mean = f"{sum(kept) / len(kept):.2f}".lstrip("0")
    assert words.format(mean) in " ".join(PAGE.split())
    assert f"at mass {section.rule.mass}" in PAGE
