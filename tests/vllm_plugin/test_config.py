"""The section `trianglemix` of --additional-config: what it means, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import ConfigurationError, TriangleMixError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.layers.plan import Fingerprint, Plan
from trianglemix.vllm.config import VARIABLE, ServingConfig, is_enabled, read_config

MODEL = Fingerprint(12, 8, 2, 64, 512, 1000)
BLOCKS: dict[str, Any] = {"layers": "1", "block_sparse_layers": "2"}
SMOLLM2 = Fingerprint(30, 9, 3, 64, 576, 49152)


def _read(section: dict[str, Any], model: Fingerprint = MODEL) -> ServingConfig:
    return read_config({"trianglemix": section}, model)


@pytest.mark.parametrize(
    ("section", "variable", "enabled"),
    [
        (None, None, False),
        (None, "0", False),
        (None, "1", True),
        ({}, None, True),
        ({"enabled": True}, None, True),
        ({"enabled": False}, None, False),
        ({"enabled": False}, "1", True),
        ({"enabled": True}, "0", False),
    ],
)
def test_who_switches(section: dict[str, Any] | None, variable: str | None, enabled: bool) -> None:
    additional = {} if section is None else {"trianglemix": section}
    environment = {} if variable is None else {VARIABLE: variable}
    assert is_enabled(additional | {"another": 1}, environment) is enabled


def test_another_platform_s_configuration_object_is_left_alone() -> None:
    assert not is_enabled(object(), {})


def test_layers_and_pattern_as_the_reference_writes_them() -> None:
    config = _read({"enabled": True, "layers": "5,7,9-11", "pattern": [4, 96, 32]})
    assert config.layers == {5, 7, 9, 10, 11}
    assert config.pattern == TrianglePattern(4, 96, 32)
    named = {"num_sink_tokens": 4, "sliding_window_size": 96, "num_last_tokens": 32}
    assert _read({"layers": [5, 7, 9, 10, 11], "pattern": named}) == config
    assert _read({"layers": [5]}).pattern == TrianglePattern()


@given(
    st.dictionaries(st.integers(0, 11), st.booleans(), min_size=1),
    st.builds(TrianglePattern, st.integers(0, 9), st.integers(1, 99), st.integers(1, 99)),
    st.builds(BlockRule, st.floats(0.01, 1), *[st.integers(1, 999)] * 4),
)
def test_the_resolved_section_means_the_same(
    roles: dict[int, bool], pattern: TrianglePattern, rule: BlockRule
) -> None:
    triangle = frozenset(layer for layer, is_triangle in roles.items() if is_triangle)
    config = ServingConfig(triangle, pattern, "anywhere", frozenset(roles) - triangle, rule)
    section = json.loads(json.dumps(config.as_section()))
    again = _read(section)
    assert again.keeps == config.keeps == {
        layer: pattern if is_triangle else rule for layer, is_triangle in roles.items()
    }  # fmt: skip
    assert again.salt == config.salt


def test_block_sparse_layers_beside_triangle_layers() -> None:
    config = _read({"layers": "8-11", "block_sparse_layers": "0-3,5", "mass": 0.9})
    assert (config.layers, config.block_layers) == ({8, 9, 10, 11}, {0, 1, 2, 3, 5})
    assert config.rule == BlockRule(mass=0.9)
    assert "triangle layers 8-11, pattern 8 sinks, window 512, last 128; " in config.description
    assert (
        "block-sparse layers 0-3,5, mass 0.9 of prompts of more than 4096 tokens"
        in config.description
    )
    named = {"mass": 0.9, "sliding_window_size": 64}
    section = {"layers": "none", "block_sparse_layers": [0], "block_rule": named, "min_length": 9}
    alone = _read(section)
    assert alone.keeps == {0: BlockRule(mass=0.9, min_length=9, sliding_window_size=64)}
    assert "triangle" not in alone.description
    assert _read({"layers": [], "block_sparse_layers": [0]}).keeps == {0: BlockRule()}
    assert _read({"layers": "1", "block_sparse_layers": "2", "mass": 1}).rule.is_dense


def test_caches_of_different_configurations_are_told_apart() -> None:
    sections: list[dict[str, Any]] = [{"layers": "1"}, {"layers": "2"}, {"layers": "1,2"}]
    sections += [{"layers": "1", "pattern": p} for p in ([9, 512, 128], [8, 513, 128], [8, 512, 9])]
    blocks = {"layers": "1", "block_sparse_layers": "2"}
    sections += [blocks, blocks | {"mass": 0.9}, blocks | {"min_length": 9}]
    sections += [blocks | {"block_sparse_layers": "3"}, {**blocks, "layers": "none"}]
    assert len({_read(section).salt for section in sections}) == len(sections)
    assert _read({"layers": "1-2"}).salt == _read({"layers": [2, 1]}).salt


def test_a_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    pattern = TrianglePattern(4, 24, 8)
    Plan("tiny", MODEL, pattern, triangle_layers=(3, 5), origin="a test").save(path)
    config = _read({"plan": str(path)})
    assert (config.layers, config.pattern) == ({3, 5}, pattern)
    assert "a test" in config.description
    assert _read({"plan": str(path), "pattern": [1, 2, 3]}).pattern == TrianglePattern(1, 2, 3)
    with pytest.raises(TriangleMixError, match="num_layers 12 != 30"):
        _read({"plan": str(path)}, SMOLLM2)


def test_the_block_sparse_layers_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    rule = BlockRule(mass=0.8, min_length=3000, num_sink_tokens=4)
    Plan(
        "tiny", MODEL, layers_by_importance=(5, 3), block_sparse=BlockSparsePlan((1, 3), rule)
    ).save(path)
    config = _read({"plan": str(path)})
    assert (config.layers, config.block_layers, config.rule) == ({3, 5}, {1}, rule)
    other = _read({"plan": str(path), "block_sparse_layers": "0", "mass": 0.9})
    assert (other.block_layers, other.rule.mass) == ({0}, 0.9)
    assert (other.rule.min_length, other.rule.num_sink_tokens) == (3000, 4)
    assert not _read({"plan": str(path), "block_sparse_layers": "none"}).block_layers
    with pytest.raises(ConfigurationError, match="names 3, of the triangle layers"):
        _read({"plan": str(path), "block_sparse_layers": "2-3"})


def test_the_shipped_plan_is_found_by_the_model_s_shape() -> None:
    config = read_config({}, SMOLLM2)
    assert len(config.layers) == 20
    assert "SmolLM2" in config.description
    assert config.block_layers == {1, 2, 3, 5, 7, 8, 14, 18, 20}
    assert config.rule == BlockRule(mass=0.9, min_length=3500)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"layer": "1"}, "layer, but its keys are enabled, layers, pattern, plan, block"),
        ({"layers": "1", "plan": "x"}, "are given together"),
        ({"layers": "1,12"}, "layer 12, but the model has 12 layers"),
        ({"layers": [-1]}, "layer -1, but the model has 12 layers"),
        ({"layers": ""}, "is not a layer or a range"),
        ({"layers": []}, "names no layer"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"layers": "1-2,2"}, "names a layer twice"),
        ({"layers": "7-5"}, "runs backwards"),
        ({"layers": 5}, "must be a list like"),
        ({"layers": [True]}, "must be a list like"),
        ({"layers": "1", "pattern": [8, 512]}, "must be three numbers"),
        ({"layers": "1", "pattern": "8,512,128"}, "must be three numbers"),
        ({"layers": "1", "pattern": [8, 512, 1.5]}, "must be three numbers"),
        ({"layers": "1", "pattern": {"sinks": 8}}, "sinks, but its keys are"),
        ({"layers": "1", "pattern": [8, 0, 128]}, "sliding_window_size is 0"),
        ({"layers": "1", "pattern": [8, 512, 0]}, "num_last_tokens is 0"),
        ({"plan": 5}, "must be a path"),
        ({"layers": "1", "mass": 0.9}, "mass, which are of block-sparse layers, but has none"),
        ({"layers": "none"}, "names no layer"),
        ({"layers": "1-3", "block_sparse_layers": "3-4"}, "names 3, of the triangle layers"),
        ({"layers": "1", "block_sparse_layers": "12"}, "layer 12, but the model has 12 layers"),
        ({"layers": "1", "block_sparse_layers": 2}, "block_sparse_layers is 2, but must be a list"),
        (BLOCKS | {"mass": 0.0}, "mass is 0.0, but must be in (0, 1]"),
        (BLOCKS | {"mass": 1.5}, "mass is 1.5, but must be in (0, 1]"),
        (BLOCKS | {"mass": "0.9"}, "mass is '0.9', but must be a number above 0"),
        (BLOCKS | {"mass": True}, "mass is True, but must be a number above 0"),
        (BLOCKS | {"min_length": 5.0}, "min_length is 5.0, but must be a whole number"),
        (BLOCKS | {"min_length": -1}, "min_length is -1"),
        (BLOCKS | {"block_rule": 0.9}, "block_rule is 0.9, but must be an object"),
        (BLOCKS | {"block_rule": {"top_p": 0.9}}, "block_rule has top_p, but its keys are mass"),
        (BLOCKS | {"mass": 0.9, "block_rule": {"mass": 0.9}}, "are given together; say it once"),
        ({"plan": "nowhere.json"}, "cannot be read"),
        ({}, "no plan is shipped for a model of this shape (12 layers, 8/2 heads of 64"),
    ],
)
def test_what_is_refused_says_why(section: dict[str, Any], words: str) -> None:
    with pytest.raises(TriangleMixError) as caught:
        _read(section)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("additional", "environment", "words"),
    [
        ({"trianglemix": "on"}, {}, "must be an object"),
        ({"trianglemix": {"enabled": 1}}, {}, "must be true or false"),
        ({}, {VARIABLE: "yes"}, "on with 1 and off with 0"),
    ],
)
def test_a_switch_that_is_no_switch(
    additional: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        is_enabled(additional, environment)
