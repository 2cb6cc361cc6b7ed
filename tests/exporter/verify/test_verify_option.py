"""`--verify` on the command line: what it prints, what it keeps, what it sees."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.targets import _onnx_runtime

from tests.exporter.command import Captured, Patch, assert_failed, run_main
from tests.exporter.exports import save_example
from tests.tiny_models import tiny_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_example(PATTERN.example().model, tmp_path / "source")


def test_a_failing_verification_keeps_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    command = [source, "-o", tmp_path / "out", "--layers", "1", "--verify", "--atol", "0"]
    assert run_main(monkeypatch, *command) == 1
    assert_failed(capsys, tmp_path, "verification failed", "allowed 0.00e+00")


def test_verify_reports_its_comparisons(
    tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    model = tiny_model("llama", "dynamo-sdpa-20")
    arguments = ["--layers", "1,2", "--sink", "2", "--window", "6", "--last", "3", "--verify"]
    assert run_main(monkeypatch, model.path, "-o", tmp_path / "out", *arguments) == 0
    assert capsys.readouterr().out.count(": ok") == 5
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    names = [check["name"] for check in report["verification"]]
    assert names == [
        "short prompt, one row padded",
        "decode steps after the short prompt, one row padded",
        "long prompt in chunks",
        "decode steps after the long prompt in chunks",
        "long prompt, kernel against function body",
    ]
    assert all(check["passed"] for check in report["verification"])


@pytest.mark.parametrize("option", ["--atol", "--verify-tokens"])
def test_options_of_verify_need_it(
    option: str, source: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    assert run_main(monkeypatch, source, "-o", tmp_path / "out", option, "3") == 2
    assert f"{option} says how --verify compares: add --verify" in capsys.readouterr().err


def test_verify_sees_a_wrong_model(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    """The defect is planted after the checks that look at the graph."""
    save = _onnx_runtime.save_model

    def spoil(model: ir.Model, *rest: object) -> list[str]:
        for node in model.graph:
            if node.op_type == "TriangleAttention":
                node.attributes["scale"] = ir.AttrFloat32("scale", 0.3)
        return save(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_onnx_runtime, "save_model", spoil)
    assert run_main(monkeypatch, source, "-o", tmp_path / "out", "--layers", "1", "--verify") == 1
    assert_failed(capsys, tmp_path, "verification failed: short prompt")
