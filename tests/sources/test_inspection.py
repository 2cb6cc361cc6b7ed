"""`--inspect` says what a model holds and changes nothing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from trianglemix.exporter.attention.sites import Pattern
from trianglemix.exporter.cli import command
from trianglemix.exporter.registry import all_patterns

from tests.exporter.exports import export_to

_PATTERNS = {pattern.name: pattern for pattern in all_patterns()}


def _saved(pattern: Pattern, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(pattern.example().model, path)
    return path


def _inspect(path: Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(command, [str(path), "--inspect"])


@pytest.mark.parametrize("name", _PATTERNS)
def test_every_form_is_named(name: str, tmp_path: Path) -> None:
    path = _saved(_PATTERNS[name], tmp_path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    result = _inspect(path)
    assert result.exit_code == 0, result.output
    assert len(re.findall(rf"│ {name} +│", result.output)) == 3
    assert "can be exported" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_what_is_not_understood_is_said(tmp_path: Path) -> None:
    path = _saved(_PATTERNS["group_query_attention"], tmp_path)
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    node.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    ir.save(model, path)
    result = _inspect(path)
    assert result.exit_code == 0, result.output
    assert "attention not understood" in result.output
    assert "would be refused" in result.output
    assert "smooth_softmax" in result.output


def test_an_export_shows_its_triangle_layers(tmp_path: Path) -> None:
    source = _saved(_PATTERNS["softmax"], tmp_path)
    export_to(source, tmp_path / "out", layers=(1,))
    result = _inspect(tmp_path / "out")
    rows = [line for line in result.output.splitlines() if "triangle_attention" in line]
    assert ["triangle 2/6/3" in row for row in rows] == [False, True, False]
    assert ["causal" in row for row in rows] == [True, False, True]


@pytest.mark.parametrize(
    "option", [("--layers", "x"), ("--layers", "1"), ("--verify",), ("--dense",)]
)
def test_options_that_it_has_no_use_for_are_refused(
    option: tuple[str, ...], tmp_path: Path
) -> None:
    path = _saved(_PATTERNS["softmax"], tmp_path)
    result = CliRunner().invoke(command, [str(path), "--inspect", *option])
    assert result.exit_code == 2
    assert f"{option[0]} has no effect" in result.output
