"""The tiny models are what they claim to be: every route gives transformers' own logits."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tests.tiny_models import PAIRS, TinyModel, tiny_model


def _run(model: TinyModel, past_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the ONNX file and of transformers for the last tokens of one random prompt."""
    from transformers import AutoModelForCausalLM

    batch = 1 if past_length else 2  # GroupQueryAttention on CPU takes no batch with a past
    ids = np.random.default_rng(7).integers(0, 256, (batch, 19))
    session = ort.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    cache = {
        name: np.zeros((batch, model.kv_num_heads, 0, model.head_size), np.float32)
        for name in names
        if name.startswith("past_key_values")
    }
    start, logits = 0, np.empty(0)
    for end in (past_length, ids.shape[1]):
        if end == start:
            continue
        feeds = {"input_ids": ids[:, start:end], "attention_mask": np.ones((batch, end), np.int64)}
        if model.has_position_ids:
            feeds["position_ids"] = np.tile(np.arange(start, end), (batch, 1))
        logits, *present = session.run(None, feeds | cache)
        cache = dict(zip(cache, present, strict=True))
        start = end
    reference = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    return logits, expected[:, -logits.shape[1] :]


@pytest.mark.parametrize("past_length", [0, 12])
@pytest.mark.parametrize(("family", "route"), PAIRS)
def test_every_route_gives_the_source_logits(family: str, route: str, past_length: int) -> None:
    logits, expected = _run(tiny_model(family, route), past_length)
    assert np.abs(expected).max() > 1.0, "flat logits would hide errors"
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
