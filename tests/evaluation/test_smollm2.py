"""Retrieval on exported folders of a real model: a right choice of layers, and a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trianglemix.evaluation.comparison import compare
from trianglemix.evaluation.onnx_model import OnnxModel
from trianglemix.evaluation.outcome import ModelRun
from trianglemix.evaluation.run import Setup, run_model
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export

from benchmarks.four_keys import TASKS
from source_models.smollm2 import SourceModelError, plain_onnx, weights_file
from tests.end_to_end.test_tiny_llm import SilentObserver

try:
    weights_file()
except SourceModelError as error:
    pytest.skip(f"SmolLM2 is not tested: {error}", allow_module_level=True)

TOKENS, SAMPLES = 2500, 6
TASK = replace(TASKS["4 keys among remarks"], max_new_tokens=9)
WRONG = LayerRequest(layers=tuple(range(15)))


def _run(folder: Path, **options: Any) -> ModelRun:
    """The answers of a new export of the model into `folder`."""
    export(ExportOptions(plain_onnx(), folder, last_token_logits=True, **options), SilentObserver())
    setup = Setup([TASK], TOKENS, SAMPLES)
    return run_model(folder.name, lambda: OnnxModel(folder, "cpu"), setup, lambda text: None)


def test_the_plan_answers_as_the_dense_twin_and_the_first_layers_do_not(tmp_path: Path) -> None:
    """Small, for the processor; 200 samples at 8,000 tokens were run on a GPU (docs/layers.md)."""
    dense = _run(tmp_path / "dense", dense=True)
    plan, wrong = _run(tmp_path / "plan"), _run(tmp_path / "wrong", layers=WRONG)
    assert dense.facts["triangle_layers"] == []
    assert len(plan.facts["triangle_layers"]) == 20
    assert wrong.facts["triangle_layers"] == list(range(15))
    assert compare(dense, plan)[0].difference.mean >= -1.5 / SAMPLES
    assert compare(dense, wrong)[0].difference.mean <= -1.5 / SAMPLES
    assert sum(plan.scores()) > sum(wrong.scores())
