"""The linter passes a clean graph and finds each planted fault, by rule and by place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets.ascend.lint import RULES, has_errors, lint, lint_file
from trianglemix.exporter.targets.ascend.lint_model import LengthAxes, LintModel, Severity
from trianglemix.exporter.targets.ascend.rules_operators import versions_of
from trianglemix.exporter.targets.ascend.soc import find_soc

from tests.exporter.targets.ascend.planted_faults import (
    FAULTS,
    SLOTS,
    Fault,
    Model,
    clean,
    plant_external,
    plant_triangle,
)


def findings_of(model: Model, soc: str = "Ascend910B3") -> list:
    return lint(LintModel(model, find_soc(soc), length_axes=LengthAxes(SLOTS)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [13, 17, 18])
def test_the_block_form_is_clean(dtype: type, opset: int) -> None:
    assert findings_of(clean(dtype, opset), "Ascend310P3") == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__.strip("_"))
def test_finds_the_planted_fault(fault: Fault) -> None:
    model = clean()
    place = fault.plant(model)
    found = findings_of(model, fault.soc)
    assert (fault.rule, place) in [(finding.rule, finding.place) for finding in found], found
    assert all(finding.source and finding.message for finding in found)


def test_every_rule_has_a_planted_fault() -> None:
    elsewhere = {"protobuf-limit", "infinity"}
    assert {rule.name for rule in RULES} == {fault.rule for fault in FAULTS} | elsewhere


def test_the_custom_operator_is_no_error_where_its_package_runs() -> None:
    for soc, more in (("Ascend910B1", set()), ("Ascend910_9392", {"custom-a3"})):
        model = clean()
        plant_triangle(model)
        found = findings_of(model, soc)
        assert {f.rule for f in found} == {"custom-operator", "mixed-domains"} | more
        assert not has_errors(found)


def test_an_infinite_mask_is_a_warning_in_float32() -> None:
    model = clean(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(np.float32([-np.inf]), "floor"))
    found = findings_of(model)
    assert [(f.rule, f.place, f.severity) for f in found] == [
        ("infinity", "floor", Severity.WARNING)
    ]
    assert not has_errors(found)


def test_two_gibibytes_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(clean(), path)
    model = LintModel(clean(), path=path)
    assert lint(model) == []
    with path.open("ab") as file:  # a sparse file: only its size counts here
        file.truncate(2**31)
    assert [finding.rule for finding in lint(model)] == ["protobuf-limit"]


def test_missing_data_file(tmp_path: Path) -> None:
    model = clean()
    plant_external(model, "weights.bin", 0)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    found = lint_file(tmp_path / "model.onnx")
    assert [(f.rule, f.place) for f in found] == [("external-data", "weight")]
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    assert lint_file(tmp_path / "model.onnx") == []


def test_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no model")
    with pytest.raises(ExportError, match="cannot be read"):
        lint_file(tmp_path / "model.onnx")


def test_versions_of_listed_operators() -> None:
    assert versions_of("", "GreaterOrEqual") == {8, *range(12, 19)}
    assert versions_of("ai.onnx", "MatMul") == frozenset(range(8, 19))
    assert versions_of("npu", "NPURmsNorm") == {1}
    assert versions_of("", "Loop") == frozenset()


def test_unknown_chip_lists_the_known_ones() -> None:
    with pytest.raises(ExportError, match=r"soc is Ascend999, but must be one of Ascend910B1"):
        find_soc("Ascend999")
