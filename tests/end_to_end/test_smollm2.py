"""T3: a real small model keeps its logits, and the demo's report has what it promises."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trianglemix.exporter.layers.plan import Plan
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.pipeline import export
from trianglemix.runtime.session import TriangleSession

from benchmarks.demo import PLAN, summarize
from benchmarks.demo_prompt import NUMBER, HiddenNumber, hide_number
from source_models.smollm2 import SourceModelError, hugging_face_folder, plain_onnx, weights_file
from tests.end_to_end.test_tiny_llm import SilentObserver

try:
    weights_file()
except SourceModelError as error:
    pytest.skip(f"SmolLM2 is not tested: {error}", allow_module_level=True)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> TriangleSession:
    """The plain ONNX file, exported without naming a plan: the shipped one must be found."""
    output = tmp_path_factory.mktemp("smollm2") / "out"
    export(ExportOptions(source=plain_onnx(), output=output), SilentObserver())
    session = TriangleSession.from_folder(output, provider="cpu")
    plan = Plan.load(PLAN)
    assert plan.block_sparse is not None
    assert session.manifest.triangle_layers == plan.triangle_layers
    assert session.manifest.block_sparse_layers == plan.block_sparse.layers
    assert session.manifest.block_rule == plan.block_sparse.rule
    return session


@pytest.fixture(scope="module")
def question(session: TriangleSession) -> list[int]:
    assert session.tokenizer is not None
    return session.tokenizer.encode_chat(QUESTION)


def test_short_prompt_gives_the_source_logits(
    session: TriangleSession, question: list[int]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(hugging_face_folder()).eval()
    with torch.no_grad():
        expected = model(torch.tensor([question])).logits[0].numpy()
    cache = session.new_cache(max_length=64)
    logits = cache.extend(np.array([question]), None, prompt_end=len(question))
    assert logits is not None
    error = np.abs(np.asarray(logits)[0] - expected[-1]).max()
    assert error <= 1e-3, f"logits off by {error} on a scale of {np.abs(expected).max()}"


def test_short_prompt_gives_the_right_answer(session: TriangleSession, question: list[int]) -> None:
    result = session.generate(question, 16)
    assert result.text.strip() == "The capital of France is Paris."
    assert result.kernel == "native"


def test_number_is_hidden_far_from_both_ends_of_a_prompt_that_fits(
    session: TriangleSession,
) -> None:
    assert session.tokenizer is not None
    prompt = hide_number(session.tokenizer, 2000)
    assert 1960 <= len(prompt.ids) <= 2000
    text = session.tokenizer.decode(prompt.ids)
    assert text.count(NUMBER) == 1
    place = len(session.tokenizer.encode(text[: text.index(NUMBER)]))
    pattern = session.manifest.pattern
    assert pattern.num_sink_tokens < place < 2000 - pattern.sliding_window_size


def test_report_has_exactly_the_promised_keys() -> None:
    def run(ttft: float, layers: list[int], blocks: list[int] | None = None) -> dict[str, Any]:
        return dict(
            answer=f"It is {NUMBER}.", ttft_s=ttft, tokens_per_s=10.0, peak_rss_mb=900.0,
            prompt_tokens=7990, kernel="native", triangle_layers=layers,
            block_sparse_layers=blocks or [],
        )  # fmt: skip

    runs = {
        "dense": [run(t, []) for t in (30, 99, 31)],
        "triangle": [run(20, [1, 2])] * 2,
        "block_sparse": [run(t, [1, 2], [0, 3]) for t in (18, 17, 90)],
    }
    report = json.loads(json.dumps(summarize(runs, HiddenNumber((1, 2), NUMBER))))
    assert set(report) == {
        "model",
        "prompt_tokens",
        "triangle_layers",
        "expected_answer",
        "dense",
        "triangle",
        "block_sparse",
        "kernel",
    }
    keys = {"answer", "ttft_s", "tokens_per_s", "peak_rss_mb"}
    for variant in ("dense", "triangle"):
        assert set(report[variant]) == keys
    assert set(report["block_sparse"]) == {*keys, "block_sparse_layers"}
    assert report["block_sparse"]["block_sparse_layers"] == [0, 3]
    assert (report["dense"]["ttft_s"], report["block_sparse"]["ttft_s"]) == (31, 18)
    assert report["triangle_layers"] == [1, 2]
    assert report["kernel"] == "native"
    runs["dense"][1]["kernel"] = "fallback"
    assert summarize(runs, HiddenNumber((1, 2), NUMBER))["kernel"] == "fallback"
