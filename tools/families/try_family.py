"""One family by both ways into the product: its folder exported, and the model patched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from trianglemix.analysis.gradients import probe
from trianglemix.analysis.model import candidate_layers
from trianglemix.analysis.sections import ProbeSample
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.sources.huggingface.run_worker import (
    HuggingFaceOptions,
    export_huggingface,
)
from trianglemix.pytorch import TriangleMixConfig, patch, unpatch

from tools.families.reference import cut_window, distance, logits_of
from tools.families.tiny_model import TOKENS

PATTERN: Final = TrianglePattern(2, 8, 4)
_TOLERANCE: Final = 1e-3
_SHORT: Final = PATTERN.exact_length
_NEW: Final = 6


@dataclass(frozen=True)
class Outcome:
    """`status` is "right", "refused" or "wrong"; `detail` the reason, or how far off it is."""

    status: str
    detail: str


def guarded(attempt: Callable[[], str]) -> Outcome:
    """The outcome of an attempt that says how far off it was, or raises AssertionError."""
    try:
        return Outcome("right", attempt())
    except TriangleMixError as error:
        return Outcome("refused", str(error))
    except AssertionError as error:
        return Outcome("wrong", str(error))
    except Exception as error:  # what a user would see as a traceback
        return Outcome("wrong", f"{type(error).__name__}: {str(error).strip()[:300]}")


def export_right(model: Any, work: Path) -> str:
    """Exports the model's folder; compares with transformers, short and with a cut window."""
    folder, made = work / "folder", work / "made"
    model.save_pretrained(folder)
    path = export_huggingface(folder, made, HuggingFaceOptions(own_process=False))
    output = work / "out"
    pattern = PatternRequest(*PATTERN.as_attributes().values())
    export(ExportOptions(path, output, layers=LayerRequest(count=1), pattern=pattern), _Silent())
    manifest = json.loads((output / "manifest.json").read_text())
    layers = manifest["triangle_layers"]
    session = _session(output / "model.onnx")
    ids = _ids(2, TOKENS)
    short = distance(_run(session, ids[:, :_SHORT]), logits_of(model, ids[:, :_SHORT]))
    assert short <= _TOLERANCE, f"a short prompt is off by {short:.1e}"
    with cut_window(model, layers, PATTERN):
        expected = logits_of(model, ids)
    cut = distance(_run(session, ids), expected)
    assert cut <= _TOLERANCE, f"a cut window is off by {cut:.1e}"
    effect = distance(expected, logits_of(model, ids))
    return f"{max(short, cut):.0e}" + _effect(effect)


def patch_right(model: Any) -> str:
    """Patches the last full layer; all kept, cut, left-padded generation, restored, probed."""
    layers = candidate_layers(model.config)[-1:] or (0,)
    ids, before = _ids(2, TOKENS), logits_of(model, _ids(2, TOKENS))
    patch(model, TriangleMixConfig(triangle_layer_indices=layers))
    same = distance(logits_of(model, ids), before)
    assert same <= _TOLERANCE, f"patched with nothing to drop it is off by {same:.1e}"
    patch(model, TriangleMixConfig.from_pattern(PATTERN, layers))
    got = logits_of(model, ids)
    padded = _padded_difference(model)
    unpatch(model)
    assert distance(logits_of(model, ids), before) == 0, "unpatch does not restore it"
    with cut_window(model, layers, PATTERN):
        expected = logits_of(model, ids)
    cut = distance(got, expected)
    assert cut <= _TOLERANCE, f"a cut window is off by {cut:.1e}"
    effect = distance(expected, before)
    probe(model, ProbeSample(tuple(ids[0].tolist()), 7), PATTERN)
    return f"{max(same, cut):.0e}{padded}" + _effect(effect)


def _padded_difference(model: Any) -> str:
    """Tokens generated for a left-padded row against the row alone; as the dense model does it."""
    ids = _ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings: dict[str, Any] = dict(max_new_tokens=_NEW, do_sample=False, eos_token_id=None)
    both = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], **settings)
    if torch.equal(both[1, TOKENS:], alone[0, TOKENS - 7 :]):
        return ""
    unpatched = _unpatched_difference(model, ids, mask, settings)
    assert unpatched, "a left-padded row generates other tokens than the row alone"
    return " (left padding changes the tokens of the model itself too)"


def _unpatched_difference(model: Any, ids: Tensor, mask: Tensor, settings: dict[str, Any]) -> bool:
    """Whether transformers' own model answers a left-padded row otherwise than the row alone."""
    chosen = dict(model.config.get_text_config().trianglemix)
    unpatch(model)
    both = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], **settings)
    patch(model, TriangleMixConfig.from_pattern(PATTERN, chosen["triangle_layers"]))
    return not torch.equal(both[1, TOKENS:], alone[0, TOKENS - 7 :])


def _effect(effect: float) -> str:
    return "" if effect > 10 * _TOLERANCE else f" (the cut itself changes {effect:.0e} only)"


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(5))


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, ids: Tensor) -> Tensor:
    B, S = ids.shape
    known = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((B, S), np.int64),
        "position_ids": np.tile(np.arange(S), (B, 1)),
    }
    feeds = {
        value.name: known[value.name]
        if value.name in known
        else np.zeros((B, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name != "prompt_length"
    }
    return torch.from_numpy(session.run(["logits"], feeds)[0])


class _Silent:
    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Any) -> None: ...
