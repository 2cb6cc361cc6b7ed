"""Hundreds of odd models: none wrong, crashed or falsely accused; most of what can be is exported.

Thousands are tried by hand: `python -m tests.odd.run --seeds 0-4999`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.odd.graph_writer import GraphWriter
from tests.odd.masks import MASKS, MaskKind, Slots
from tests.odd.odd_model import draw_model
from tests.odd.run import BAD, as_record, run_all, share_exported
from tests.odd.trial import Depth, Outcome, _Bench

_SEEDS = 200
_LEAST_SHARE = 0.85  # of the models whose mask is causal or a sliding window


@pytest.fixture(scope="module")
def records() -> list[dict[str, object]]:
    jobs = min(4, os.cpu_count() or 1)
    return [as_record(trial, "tested") for trial in run_all(list(range(_SEEDS)), jobs)]


def test_no_odd_model_is_silently_wrong(records: list[dict[str, object]]) -> None:
    bad = {outcome.name for outcome in BAD}
    told = [f"{x['seed']} {x['outcome']}: {x['detail']}" for x in records if x["outcome"] in bad]
    assert not told, "\n".join(told)


def test_most_that_can_be_are_exported(records: list[dict[str, object]]) -> None:
    assert len(records) == _SEEDS
    assert share_exported(records) >= _LEAST_SHARE


@pytest.mark.parametrize("cache", ["BHTD", "none"])
@pytest.mark.parametrize("counted", [True, False])
def test_windows_over_positions(
    cache: str, counted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Keys counted as positions are: right. By their slots: padded rows see other keys."""

    def write(g: GraphWriter, s: Slots) -> str:
        keys = s.keys
        if counted:
            ones = g.cast("attention_mask", "int64")
            keys = g.op("Sub", g.op("CumSum", ones, g.constant(1)), g.constant(1))
            keys = g.unsqueeze(keys, 1, 2)
        distance = g.op("Sub", g.unsqueeze("position_ids", 1, 3), keys)
        return str(g.op("Less", distance, g.constant(s.size)))

    monkeypatch.setitem(MASKS, "positions", MaskKind("window", write))
    plain = {"dtype": "float32", "cache_dtype": "float32", "mask_form": "where", "batch": "batch"}
    kinds = {"scale": "times", "spelling": "softmax", "attribute": "none", "extra": "nothing"}
    model = replace(draw_model(0), mask="positions", size=40, positions="rank2", cache=cache,
                    opset=18, kv_heads=2, repeat="expand", **plain, **kinds)  # fmt: skip
    trial = _Bench(model, tmp_path, Depth(verify=True)).trial()
    assert trial.outcome is (Outcome.RIGHT if counted else Outcome.REFUSED), trial.detail
