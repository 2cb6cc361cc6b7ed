"""Retrieval on exported folders of a real model: the plan answers as the dense twin does."""

from __future__ import annotations

from pathlib import Path

import pytest
from trianglemix.evaluation.onnx_model import OnnxModel
from trianglemix.evaluation.run import ModelRun, Setup, compare, run_model
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.pipeline import export

from benchmarks.smollm2 import SourceModelError, plain_onnx, weights_file
from tests.end_to_end.test_tiny_llm import SilentObserver

try:
    weights_file()
except SourceModelError as error:
    pytest.skip(f"SmolLM2 is not tested: {error}", allow_module_level=True)

TOKENS, SAMPLES = 1400, 3


def _exported(folder: Path, dense: bool) -> Path:
    export(
        ExportOptions(plain_onnx(), folder, dense=dense, last_token_logits=True), SilentObserver()
    )
    return folder


def test_the_plan_finds_the_number_among_four_as_the_dense_twin_does(tmp_path: Path) -> None:
    """Half of what a row sees is dropped at this length; 200 samples at 8,000 run on a GPU."""
    setup = Setup(pick_tasks(["niah_multikey_1"]), TOKENS, SAMPLES)

    def run(name: str, dense: bool) -> ModelRun:
        folder = _exported(tmp_path / name, dense)
        return run_model(name, lambda: OnnxModel(folder, "cpu"), setup, lambda text: None)

    dense, plan = run("dense", True), run("plan", False)
    assert dense.facts["triangle_layers"] == []
    assert len(plan.facts["triangle_layers"]) == 20
    assert sum(dense.scores()) >= SAMPLES - 1
    (row,) = compare(dense, plan)
    assert row.difference.mean >= -1 / SAMPLES
