"""Weights inside a proto: small ones stay, many go to a data file, too many are refused."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
import pytest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.onnx_file import model_file as model_io
from trianglemix.exporter.onnx_file.proto_size import (
    INLINE_DATA_FILE,
    MAX_PROTO_BYTES,
    check_proto_size,
    move_inline_weights,
    serialize,
)
from trianglemix.exporter.patterns.softmax import PATTERN

from tests.exporter.exports import Session, assert_close, export_to, random_ids


def _weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)


def test_weights_up_to_the_limit_stay(tmp_path: Path) -> None:
    model = PATTERN.example().model
    before = serialize(model)
    assert move_inline_weights(model, tmp_path, limit=_weight_bytes(model)) == []
    assert serialize(model) == before
    assert not list(tmp_path.iterdir())


def test_weights_over_the_limit_are_moved(tmp_path: Path) -> None:
    model = PATTERN.example().model
    before = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    (note,) = move_inline_weights(model, tmp_path, limit=10_000)
    assert INLINE_DATA_FILE in note
    assert len(serialize(model)) < 25_000 < _weight_bytes(model)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        assert (value.const_value.numpy() == before[name]).all()
        assert isinstance(value.const_value, ir.ExternalTensor) == (before[name].nbytes > 1024)


def test_an_export_with_moved_weights_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ir.save(PATTERN.example().model, tmp_path / "model.onnx")
    export_to(tmp_path / "model.onnx", tmp_path / "inline", layers=(1,))
    monkeypatch.setattr(
        model_io,
        "move_inline_weights",
        lambda model, folder: move_inline_weights(model, folder, limit=2000),
    )
    report = export_to(tmp_path / "model.onnx", tmp_path / "out", layers=(1,))
    assert any("moved to" in note for note in report.notes)
    small, large = ((tmp_path / name / "model.onnx").stat().st_size for name in ("out", "inline"))
    assert small < large
    ids = random_ids(1, 30)
    results = [Session.of(tmp_path / name).logits(ids) for name in ("out", "inline")]
    assert_close(*results, 0)


def test_a_source_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, MAX_PROTO_BYTES)  # sparse
    check_proto_size(path)
    os.truncate(path, MAX_PROTO_BYTES + 1)
    with pytest.raises(ExportError, match=r"2147483648 bytes in one proto.*external data"):
        export_to(path, tmp_path / "out", layers=(1,))
    assert not (tmp_path / "out").exists()


def test_a_result_over_the_limit_is_refused() -> None:
    model = PATTERN.example().model
    size = len(serialize(model))
    assert len(serialize(model, limit=size)) == size
    with pytest.raises(ExportError, match=rf"would have {size} bytes.*ends at {size - 1}"):
        serialize(model, limit=size - 1)
