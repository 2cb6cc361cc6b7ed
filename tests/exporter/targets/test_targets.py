"""Lowering to GroupQueryAttention: the dense twin, the CUDA target, windowed layers, padding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_targets
from trianglemix.exporter.targets._onnx_runtime import OnnxRuntimeTarget
from trianglemix.manifest.manifest import Manifest

from tests.exporter import odd_models
from tests.exporter.example_oracle import example_logits
from tests.exporter.exports import (
    SMALL,
    Session,
    Silent,
    assert_close,
    export_to,
    random_ids,
    save_example,
)

ONLINE = [name for name, target in all_targets().items() if isinstance(target, OnnxRuntimeTarget)]


def _operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(folder / "model.onnx").graph)


@pytest.mark.parametrize("target", ONLINE)
def test_dense_twin_is_the_source_on_group_query_attention(target: str, tmp_path: Path) -> None:
    example = PATTERN.example()
    path = save_example(example.model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", dense=True, target=target)
    operators = _operators(tmp_path / "out")
    assert operators["GroupQueryAttention"] == 3
    assert not operators["TriangleAttention"]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.triangle_layers == ()
    assert manifest.prompt_length is None
    assert not manifest.left_padding
    assert not ir.load(tmp_path / "out" / "model.onnx").functions
    assert {row.runs_as for row in report.layers} == {"GroupQueryAttention"}
    ids = random_ids(2, 40)
    expected = example_logits(example, ids, {})
    assert_close(Session.of(tmp_path / "out").logits(ids), expected)


def test_cuda_target_mixes_both_operators(tmp_path: Path) -> None:
    example = PATTERN.example()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(2,), target="cuda")
    operators = _operators(tmp_path / "out")
    assert operators["GroupQueryAttention"] == 2
    assert operators["TriangleAttention"] == 1
    ids = random_ids(2, 33)
    expected = example_logits(example, ids, {2: TrianglePattern(2, 6, 3)})
    assert_close(Session.of(tmp_path / "out").logits(ids), expected)


@pytest.mark.parametrize("target", ONLINE)
def test_left_padding_on_group_query_attention_is_never_silent(target: str, tmp_path: Path) -> None:
    path = save_example(PATTERN.example().model, tmp_path / "source")
    export_to(path, tmp_path / "out", dense=True, target=target)
    ids = random_ids(2, 20)
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    logits = Session.of(tmp_path / "out").logits(ids, mask)
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[0]).all()


@pytest.mark.parametrize("target", ONLINE)
def test_windowed_layers_keep_exactly_their_window(target: str, tmp_path: Path) -> None:
    example = odd_models.every_second_windowed()
    path = save_example(example.model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(1,), target=target)
    assert [row.action for row in report.layers] == ["windowed", "triangle", "windowed"]
    assert report.layers[0].mask == f"sliding window {odd_models.WINDOW}"
    ids = random_ids(1, 33)
    windows = {0: odd_models.WINDOW, 2: odd_models.WINDOW}
    expected = example_logits(example, ids, {1: TrianglePattern(2, 6, 3)}, windows=windows)
    session = Session.of(tmp_path / "out")
    assert_close(session.logits(ids), expected)
    first = session.run(ids[:, :30], prompt_length=[33])
    rest = session.run(
        ids[:, 30:], np.ones((1, 33), int), session.carried(first), prompt_length=[33]
    )
    parts = [first["logits"], rest["logits"]]
    assert_close(np.concatenate(parts, axis=1), expected)


def test_a_windowed_layer_is_not_made_a_triangle_layer(tmp_path: Path) -> None:
    path = save_example(odd_models.every_second_windowed().model, tmp_path / "source")
    with pytest.raises(ExportError, match="layer 2, which slides a window of its own"):
        export_to(path, tmp_path / "out", layers=(1, 2))
    request = LayerRequest(start_layer=1)
    report = export(ExportOptions(path, tmp_path / "out", layers=request, pattern=SMALL), Silent())
    assert [row.action for row in report.layers] == ["windowed", "triangle", "windowed"]
    assert "chosen, but" in report.layers[2].reason


def test_a_model_of_windows_only_has_no_triangle_layer(tmp_path: Path) -> None:
    path = save_example(odd_models.windowed().model, tmp_path / "source")
    with pytest.raises(ExportError, match="all chosen ones slide a window"):
        export_to(path, tmp_path / "out")


def test_a_softcap_is_carried_everywhere(tmp_path: Path) -> None:
    example = odd_models.softcapped(2.0)
    path = save_example(example.model, tmp_path / "source")
    report = export_to(path, tmp_path / "triangle", layers=(1,))
    assert {row.softcap for row in report.layers} == {2.0}
    export_to(path, tmp_path / "dense", dense=True)
    ids = random_ids(1, 33)
    small = {1: TrianglePattern(2, 6, 3)}
    triangle = example_logits(example, ids, small, softcap=2.0)
    assert_close(Session.of(tmp_path / "triangle").logits(ids), triangle)
    dense = example_logits(example, ids, {}, softcap=2.0)
    assert_close(Session.of(tmp_path / "dense").logits(ids), dense)
