"""Retrieval on exported folders of a real model: the plan's layers cost nothing here either."""

from __future__ import annotations

from pathlib import Path

import pytest
from trianglemix.evaluation.onnx_model import OnnxModel
from trianglemix.evaluation.run import Setup, compare, run_model
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export

from benchmarks.smollm2 import SourceModelError, plain_onnx, weights_file
from tests.end_to_end.test_tiny_llm import SilentObserver

try:
    weights_file()
except SourceModelError as error:
    pytest.skip(f"SmolLM2 is not tested: {error}", allow_module_level=True)

TOKENS, SAMPLES = 1400, 3


def _exported(folder: Path, dense: bool, layers: tuple[int, ...] | None = None) -> Path:
    request = LayerRequest(layers=layers) if layers else LayerRequest()
    options = ExportOptions(
        plain_onnx(), folder, layers=request, dense=dense, last_token_logits=True
    )
    export(options, SilentObserver())
    return folder


def test_the_plan_finds_the_number_among_four_and_every_layer_does_not(tmp_path: Path) -> None:
    folders = {
        "dense": _exported(tmp_path / "dense", dense=True),
        "plan": _exported(tmp_path / "plan", dense=False),
        "all layers": _exported(tmp_path / "all", dense=False, layers=tuple(range(30))),
    }
    setup = Setup(pick_tasks(["niah_multikey_1"]), TOKENS, SAMPLES)
    runs = {
        name: run_model(name, lambda f=folder: OnnxModel(f, "cpu"), setup, lambda text: None)
        for name, folder in folders.items()
    }
    assert len(runs["plan"].facts["triangle_layers"]) == 20
    assert sum(runs["dense"].scores()) >= SAMPLES - 1
    (row,) = compare(runs["dense"], runs["plan"])
    assert row.difference.mean >= -1 / SAMPLES
    assert sum(runs["all layers"].scores()) <= sum(runs["plan"].scores())
