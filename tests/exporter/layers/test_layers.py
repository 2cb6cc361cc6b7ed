"""The choice of layers: options, plans, defaults, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.attention.sites import AttentionSite, Layout, MaskClass, Operand
from trianglemix.exporter.errors import ExportError, PlanError
from trianglemix.exporter.layers import choice as layers_module
from trianglemix.exporter.layers import plan as plan_module
from trianglemix.exporter.layers.choice import choose_layers
from trianglemix.exporter.layers.plan import Fingerprint, Plan, find_shipped_plan, shipped_plans
from trianglemix.exporter.options import (
    ExportOptions,
    LayerRequest,
    PatternRequest,
    parse_layers,
)

MODEL = Fingerprint(12, 4, 2, 16, 40, 61)


def _sites(count: int = 12, windowed: tuple[int, ...] = ()) -> list[AttentionSite]:
    value = ir.Value(name="x")
    operand = Operand(value, Layout.FLAT)
    site = AttentionSite(
        layer=0, form="softmax", anchor=ir.node("Softmax", [value]),
        shape=AttentionShape(4, 2, 16, 16), scale=0.25, softcap=0.0, mask=MaskClass(),
        query=operand, key=operand, value=operand, past=None, present=None, output=operand,
    )  # fmt: skip
    return [
        replace(site, layer=layer, mask=MaskClass(64 if layer in windowed else None))
        for layer in range(count)
    ]


def _options(request: LayerRequest, **others: object) -> ExportOptions:
    return ExportOptions(Path("model.onnx"), Path("out"), layers=request, **others)  # type: ignore[arg-type]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    Plan("tiny", MODEL, TrianglePattern(4, 100, 20), (9, 3, 11, 7), (3, 9), "by hand").save(path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", (5,)), ("5,7,10,15-17", (5, 7, 10, 15, 16, 17)), ("3-3, 1", (1, 3)), ("9,2", (2, 9))],
)
def test_layer_lists(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,,2", "5-3", "1-", "-1", "2,1-3", "1;2"])
def test_wrong_layer_lists_are_refused(text: str) -> None:
    with pytest.raises(ExportError, match="--layers"):
        parse_layers(text)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_any_set_of_layers_survives_being_written(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, sorted(layers)))) == tuple(sorted(layers))


def test_named_layers_start_layer_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "find_shipped_plan", lambda model: None)
    named = choose_layers(_options(LayerRequest(layers=(1, 5))), _sites(), MODEL)
    assert named.layers == {1, 5}
    start = choose_layers(_options(LayerRequest(start_layer=9)), _sites(), MODEL)
    assert start.layers == {9, 10, 11}
    count = choose_layers(_options(LayerRequest(count=2)), _sites(), MODEL)
    assert count.layers == {10, 11}


def test_default_is_the_deepest_quarter_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "find_shipped_plan", lambda model: None)
    choice = choose_layers(_options(LayerRequest()), _sites(), MODEL)
    assert choice.layers == {9, 10, 11}
    assert choice.warning is not None
    assert "trianglemix-analyze" in choice.warning
    around = choose_layers(_options(LayerRequest()), _sites(windowed=(8, 9, 10, 11)), MODEL)
    assert around.layers == {6, 7}, "a layer that slides by itself is not counted"


def test_a_plan_gives_layers_and_pattern(plan: Path) -> None:
    choice = choose_layers(_options(LayerRequest(plan=plan)), _sites(), MODEL)
    assert choice.layers == {3, 9}
    assert choice.pattern == TrianglePattern(4, 100, 20)
    assert "tiny" in choice.origin
    assert "by hand" in choice.origin
    own = _options(LayerRequest(plan=plan), pattern=PatternRequest(window=7))
    assert choose_layers(own, _sites(), MODEL).pattern == TrianglePattern(4, 7, 20)
    cut = choose_layers(_options(LayerRequest(plan=plan, count=3)), _sites(), MODEL)
    assert cut.layers == {9, 3, 11}


def test_the_shipped_plan_is_recognised_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("tiny", MODEL, layers_by_importance=(9, 3, 11, 7))
    monkeypatch.setattr(layers_module, "find_shipped_plan", lambda model: plan)
    assert choose_layers(_options(LayerRequest()), _sites(), MODEL).layers == {9, 3, 11, 7}
    assert choose_layers(_options(LayerRequest(count=1)), _sites(), MODEL).layers == {9}


@pytest.mark.parametrize(("measured", "warns"), [(False, True), (True, False), (None, False)])
def test_an_unmeasured_plan_is_taken_with_a_warning(
    measured: bool | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan("tiny", MODEL, triangle_layers=(3, 9), figures={"measured": measured})
    monkeypatch.setattr(layers_module, "find_shipped_plan", lambda model: plan)
    choice = choose_layers(_options(LayerRequest()), _sites(), MODEL)
    assert choice.layers == {3, 9}
    assert ("nobody has measured" in (choice.warning or "")) is warns


def test_plans_for_another_model_are_refused(plan: Path) -> None:
    other = replace(MODEL, num_heads=8)
    with pytest.raises(PlanError, match="num_heads 4 != 8"):
        choose_layers(_options(LayerRequest(plan=plan)), _sites(), other)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (LayerRequest(layers=(1, 12)), r"layer 12, but the model has 12 layers \(0-11\)"),
        (LayerRequest(start_layer=12), "--start-layer is 12"),
        (LayerRequest(start_layer=-1), "--start-layer is -1"),
        (LayerRequest(count=0), "--num-triangle-layers is 0"),
        (LayerRequest(count=13), "--num-triangle-layers is 13"),
        (LayerRequest(layers=(2, 3)), "layer 3, which slides a window of its own"),
        (LayerRequest(start_layer=11), "no layer would become a triangle layer"),
    ],
)
def test_impossible_choices_are_refused(request_: LayerRequest, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        choose_layers(_options(request_), _sites(windowed=(3, 11)), MODEL)


def test_the_dense_twin_has_no_triangle_layer() -> None:
    choice = choose_layers(_options(LayerRequest(), dense=True), _sites(), MODEL)
    assert not choice.layers


def test_plan_files_come_back_as_they_were(plan: Path) -> None:
    again = Plan.load(plan)
    copy = plan.with_name("copy.json")
    again.save(copy)
    assert Plan.load(copy) == again
    assert copy.read_text() == plan.read_text()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format_version": 2}',
        '{"format_version": 1}',
        '{"format_version": 1, "model": {"name": "x", "fingerprint": {"num_layers": 2}}}',
        '{"format_version": 1, "model": {"name": "x", "fingerprint": {"num_layers": 2, '
        '"num_heads": 1, "kv_num_heads": 1, "head_size": 8}}, "triangle_layers": [2]}',
        '{"format_version": 1, "model": {"name": "x", "fingerprint": {"num_layers": 2, '
        '"num_heads": 1, "kv_num_heads": 1, "head_size": 8}}, "triangle_layers": [1, 1]}',
        '{"format_version": 1, "model": {"name": "x", "fingerprint": {"num_layers": 2, '
        '"num_heads": 1, "kv_num_heads": 1, "head_size": 8}}}',
        '{"format_version": 1, "model": {"name": "x", "fingerprint": {"num_layers": 2, '
        '"num_heads": 1, "kv_num_heads": 1, "head_size": 8}}, "triangle_layers": [1], '
        '"pattern": {"sliding_window_size": 0}}',
    ],
)
def test_broken_plans_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError):
        Plan.load(path)


def test_shipped_plans_fit_their_own_models_alone() -> None:
    plans = shipped_plans()
    assert plans, "no plan is shipped"
    for plan in plans:
        found = find_shipped_plan(plan.fingerprint)
        assert found is not None
        assert plan.name in found.name.split(" or ")
        assert found.chosen_layers == plan.chosen_layers
        assert not found.fingerprint.mismatches(replace(plan.fingerprint, hidden_size=None))
    assert find_shipped_plan(MODEL) is None


def test_plans_that_disagree_are_not_guessed_between(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Plan(name, MODEL, triangle_layers=layers) for name, layers in
                  (("one", (3,)), ("other", (4,))))  # fmt: skip
    monkeypatch.setattr(plan_module, "shipped_plans", lambda: [one, other])
    with pytest.raises(PlanError, match="one or other"):
        find_shipped_plan(MODEL)
    monkeypatch.setattr(plan_module, "shipped_plans", lambda: [one, replace(one, name="same")])
    found = find_shipped_plan(MODEL)
    assert found is not None
    assert found.name == "one or same"


def test_a_plan_that_is_not_there_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json cannot be read .*trianglemix-analyze wrote"):
        Plan.load(tmp_path / "none.json")


def test_pattern_parameters_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="sliding_window_size is 0"):
        PatternRequest(window=0).over(TrianglePattern())
