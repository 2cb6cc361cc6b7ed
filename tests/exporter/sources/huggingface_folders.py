"""Hugging Face folders of tests: made, exported in this process, run, compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.function_body import build_function
from trianglemix.exporter.sources.huggingface.worker import export_model

from tests.tiny_models import tiny_folder

Array = np.ndarray[Any, Any]
LENGTH = 40  # longer than gemma2's window of 24


@dataclass(frozen=True)
class Exported:
    """A folder, its ONNX graph, and a session in which ONNX Runtime inlines the function."""

    folder: Path
    graph: ir.Graph
    session: ort.InferenceSession


def export_here(folder: Path, work: Path, dtype: str = "auto") -> Path:
    """What `export_huggingface` does in its worker, without a process of its own."""
    path = work / "model.onnx"
    export_model(folder, path, dtype, lambda name: None)
    return path


def open_model(folder: Path, path: Path) -> Exported:
    model = ir.load(path)
    function = build_function()
    model.functions[function.identifier()] = function
    model.opset_imports[contract.DOMAIN] = contract.OP_VERSION
    standalone = path.with_name("standalone.onnx")
    ir.save(model, standalone, external_data="standalone.data")
    session = ort.InferenceSession(standalone, providers=["CPUExecutionProvider"])
    return Exported(folder, ir.load(path).graph, session)


def run(session: ort.InferenceSession, ids: Array, mask: Array, splits: list[int]) -> Array:
    """Logits `[B, S, V]` of one prompt, in chunks that end at `splits`, the cache handed on."""
    positions = (mask.cumsum(1) - 1).clip(min=0)
    cache = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    chunks, start = [], 0
    for end in splits:
        feeds = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        if "position_ids" in {value.name for value in session.get_inputs()}:
            feeds["position_ids"] = positions[:, start:end]
        logits, *present = session.run(None, feeds | cache)
        cache = dict(zip(cache, present, strict=True))
        chunks.append(logits)
        start = end
    return np.concatenate(chunks, 1)


def source_logits(folder: Path, ids: Array, mask: Array) -> Array:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    positions = (mask.cumsum(1) - 1).clip(min=0)
    with torch.no_grad():
        logits: Array = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    return logits


def save_random(family: str, folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    made = AutoConfig.for_model(family, **(sizes | config))
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def save_bfloat16(family: str, folder: Path) -> Path:
    """A tiny folder with bfloat16 weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype="bfloat16")
    model.save_pretrained(folder)
    return folder


def assert_right(folder: Path, work: Path) -> None:
    model = open_model(folder, export_here(folder, work))
    ids = np.random.default_rng(3).integers(3, 61, (2, LENGTH))
    mask = np.ones_like(ids)
    expected = source_logits(model.folder, ids, mask)
    logits = run(model.session, ids, mask, [29, LENGTH])
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()
