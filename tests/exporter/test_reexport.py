"""An exported model can be exported again with other layers, and its windows and lengths stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript.optimizer import fold_constants
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.graph.attention_node import NEVER_LAST, AttentionNode, LayerRole
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.manifest.manifest import Manifest

from tests.exporter import odd_models
from tests.exporter.example_oracle import example_logits
from tests.exporter.exports import (
    Session,
    assert_close,
    export_to,
    random_ids,
    rename_all,
    save_example,
)
from tests.tiny_models import tiny_model

SMALL = TrianglePattern(2, 6, 3)


@pytest.mark.parametrize("route", ["dynamo-sdpa-20", "gqa"])
def test_other_layers_of_an_exported_model(route: str, tmp_path: Path) -> None:
    source = tiny_model("llama", route).path
    export_to(source, tmp_path / "first", layers=(0, 1))
    export_to(tmp_path / "first", tmp_path / "again", layers=(2,))
    export_to(source, tmp_path / "direct", layers=(2,))
    assert Manifest.load(tmp_path / "again").triangle_layers == (2,)
    ids = random_ids(2, 33, 256)
    mask = np.ones_like(ids)
    mask[1, 25:] = 0
    again, direct = (Session.of(tmp_path / name) for name in ("again", "direct"))
    assert again.manifest == direct.manifest
    assert_close(again.logits(ids, mask), direct.logits(ids, mask))
    told = [again.logits(ids, prompt_length=[50]), direct.logits(ids, prompt_length=[50])]
    assert_close(*told)


@pytest.mark.parametrize("target", ["cpu", "cuda", "hopper"])
def test_a_dense_twin_is_verified_where_its_source_drops_nothing(
    target: str, tmp_path: Path
) -> None:
    source = tiny_model("llama").path
    export_to(source, tmp_path / "first", layers=(0, 1))  # drops from the 12th token on
    options = {"dense": True, "verify": True, "target": target}
    report = export_to(tmp_path / "first", tmp_path / "dense", **options)
    assert [check.tokens for check in report.verification] == [8, 11]
    assert [note for note in report.notes if "where it drops nothing, up to 11 tokens" in note]
    report = export_to(source, tmp_path / "plain", **options)
    assert [check.tokens for check in report.verification] == [154, 157, 2045, 2048]
    assert not [note for note in report.notes if "drops" in note]


def test_windowed_layers_stay_windowed(tmp_path: Path) -> None:
    example = odd_models.every_second_windowed()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "first", layers=(1,))
    report = export_to(tmp_path / "first", tmp_path / "again", layers=(1,))
    assert [row.action for row in report.layers] == ["windowed", "triangle", "windowed"]
    windows = {0: odd_models.WINDOW, 2: odd_models.WINDOW}
    ids = random_ids(1, 33)
    expected = example_logits(example, ids, {1: SMALL}, windows=windows)
    assert_close(Session.of(tmp_path / "again").logits(ids), expected)


def test_last_token_logits_added_afterwards(tmp_path: Path) -> None:
    path = save_example(PATTERN.example().model, tmp_path / "source")
    export_to(path, tmp_path / "first", layers=(1,))
    export_to(tmp_path / "first", tmp_path / "again", layers=(1,), last_token_logits=True)
    ids = random_ids(2, 30)
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    full = Session.of(tmp_path / "first").logits(ids, mask)
    last = Session.of(tmp_path / "again").logits(ids, mask, prompt_length=[0, 0])
    assert_close(last, full[np.arange(2), [29, 19]][:, None])


def test_the_dense_twin_of_an_exported_model(tmp_path: Path) -> None:
    example = PATTERN.example()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "first", layers=(1,))
    export_to(tmp_path / "first", tmp_path / "dense", dense=True)
    ids = random_ids(1, 33)
    expected = example_logits(example, ids, {})
    assert_close(Session.of(tmp_path / "dense").logits(ids), expected)


def _renamed(path: Path, output: Path) -> None:
    """Every node and inner value under another name."""
    model = ir.load(path)
    rename_all(model)
    ir.save(model, output)


def _optimized(level: str, path: Path, output: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(output)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _folded(path: Path, output: Path) -> None:
    model = ir.load(path)
    fold_constants(model)
    ir.save(model, output)


@pytest.mark.parametrize(
    "change",
    [_renamed, partial(_optimized, "ORT_ENABLE_BASIC"), partial(_optimized, "ORT_ENABLE_EXTENDED"),
     _folded],
    ids=["renamed", "basic", "extended", "folded"],
)  # fmt: skip
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_windows_stay_whatever_an_optimizer_did(
    target: str, change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """Another choice of layers and the dense twin both keep the source's own windows."""
    example = odd_models.every_second_windowed()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "first", layers=(1,), target=target)
    (tmp_path / "changed").mkdir()
    changed = tmp_path / "changed" / "model.onnx"
    change(tmp_path / "first" / "model.onnx", changed)
    windows = {0: odd_models.WINDOW, 2: odd_models.WINDOW}
    ids = random_ids(1, 33)
    report = export_to(changed, tmp_path / "again", layers=(1,))
    assert [row.action for row in report.layers] == ["windowed", "triangle", "windowed"]
    expected = example_logits(example, ids, {1: SMALL}, windows=windows)
    assert_close(Session.of(tmp_path / "again").logits(ids), expected)
    export_to(changed, tmp_path / "dense", dense=True)
    expected = example_logits(example, ids, {}, windows=windows)
    assert_close(Session.of(tmp_path / "dense").logits(ids), expected)


def test_the_hugging_face_route_writes_windows_that_are_known() -> None:
    """Its windowed layers get their `prompt_length` from a ConstantOfShape."""
    filled = ir.tensor(np.array([NEVER_LAST], np.int32))
    shape = ir.Value(name="shape")
    length = ir.Node("", "ConstantOfShape", [shape], [ir.AttrTensor("value", filled)])
    inputs = [*(ir.Value(name=f"x{n}") for n in range(7)), length.outputs[0], ir.Value(name="v")]
    pattern = [ir.AttrInt64(name, number) for name, number in
               TrianglePattern(0, 24, 1).as_attributes().items()]  # fmt: skip
    node = AttentionNode(ir.Node("trianglemix", "TriangleAttention", inputs, pattern))
    assert node.role is LayerRole.WINDOWED
