"""A plan's section on block-sparse layers: reading, writing, what it says of a prompt's density."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.exporter.errors import PlanError
from trianglemix.exporter.layers import plan as plan_module
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.layers.plan import Fingerprint, Plan, find_shipped_plan

MODEL: Final = Fingerprint(12, 4, 2, 16, 40, 61)
SECTION: Final = BlockSparsePlan(
    layers=(0, 1, 5),
    rule=BlockRule(0.9, 1000, 4, 256, 64),
    densities={4000: {0: 0.6, 1: 0.5}, 16000: {0: 0.4, 1: 0.1}},
    origin="measured",
    figures={"mass": [0.9]},
)
PLAN: Final = Plan("tiny", MODEL, triangle_layers=(3, 9), block_sparse=SECTION)


def _content(section: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "model": {"name": "tiny", "fingerprint": {"num_layers": 12, "num_heads": 4,
                                                  "kv_num_heads": 2, "head_size": 16}},
        "triangle_layers": [3, 9],
        "block_sparse": section,
    }  # fmt: skip


def test_the_section_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert json.loads(path.read_text())["format_version"] == 1
    without = replace(PLAN, block_sparse=None)
    without.save(path)
    assert "block_sparse" not in json.loads(path.read_text())
    assert Plan.load(path) == without


def test_layers_alone_make_a_section(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_content({"layers": [7], "rule": {"mass": 0.8}})))
    section = Plan.load(path).block_sparse
    assert section == BlockSparsePlan((7,), replace(BlockRule(), mass=0.8))
    assert section.density(7, 32768) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"layers": []}, "names no layer, or one twice"),
        ({"layers": [1, 1]}, "names no layer, or one twice"),
        ({"layers": [12]}, "has layer 12, but its model has 12 layers"),
        ({"layers": [1, 3]}, "names 3, which triangle_layers has too"),
        ({"layers": [1], "rule": {"mass": 0}}, "block_sparse.rule: mass is 0.0, but must be"),
        ({"layers": [1], "rule": {"masse": 0.9}}, "rule.masse is 0.9: unexpected keyword"),
        ({"layers": [1], "densities": {"8000": {"1": 0}}}, "layer 1 keeps 0.0 at 8000 tokens"),
        ({"layers": [1], "densities": {"8000": {"1": 1.1}}}, "layer 1 keeps 1.1 at 8000 tokens"),
        ({"layers": [1], "densities": {"0": {"1": 0.5}}}, "layer 1 keeps 0.5 at 0 tokens"),
        ({"layers": [1], "densities": [0.5]}, "input should be an object"),
        (
            {"layers": [1], "rule": {"min_length": 10.5}},
            "min_length is 10.5: input",
        ),
        ({"layers": [1], "mass": 0.8}, "block_sparse.mass is 0.8: unexpected keyword"),
        ({"layers": "12"}, "layers is '12': input should be a valid array"),
        ({"layers": [0.5]}, "layers.0 is 0.5: input should be a valid int"),
        ({"rule": {}}, "block_sparse.layers: field required"),
        ({}, "is not understood"),
        ([1], "is not understood"),
    ],
)
def test_a_broken_section_is_refused(section: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_content(section)))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_density_by_length() -> None:
    assert SECTION.density(0, 1000) == 1, "up to min_length the rule keeps everything"
    assert SECTION.density(0, 3999) == 1, "nobody measured a shorter prompt"
    assert SECTION.density(0, 4000) == 0.6
    assert SECTION.density(0, 8000) == pytest.approx(0.5), "half way, by the logarithm"
    assert SECTION.density(1, 8000) == pytest.approx(0.3)
    assert SECTION.density(0, 16000) == pytest.approx(0.4)
    assert SECTION.density(0, 131072) == 0.4
    assert SECTION.density(5, 8000) is None


def test_shipped_plans_may_not_disagree_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(PLAN, name="twin", block_sparse=replace(SECTION, densities={}))
    monkeypatch.setattr(plan_module, "shipped_plans", lambda: [PLAN, other])
    found = find_shipped_plan(MODEL)
    assert found is not None
    assert found.block_sparse == SECTION
    for section in (None, replace(SECTION, layers=(0,)), replace(SECTION, rule=BlockRule())):
        twin = replace(other, block_sparse=section)
        monkeypatch.setattr(plan_module, "shipped_plans", lambda twin=twin: [PLAN, twin])
        with pytest.raises(PlanError, match="several shipped plans fit"):
            find_shipped_plan(MODEL)
