"""Report and manifest say what is true of the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep_mask
from trianglemix.exporter.options import PatternRequest
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.sources.companions import Companions
from trianglemix.exporter.sources.model_config import read_context_length
from trianglemix.manifest.manifest import LayerCache, Manifest

from tests.exporter.exports import Session, export_to, random_ids, save_example
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("route", ["dynamo-sdpa-20", "torchscript-18", "gqa"])
def test_manifest_is_true(route: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3", route)
    export_to(model.path, tmp_path / "out", layers=(1, 2))
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.cache == tuple(
        LayerCache(
            layer,
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            f"present.{layer}.key",
            f"present.{layer}.value",
            2,
            16,
            16,
        )
        for layer in range(3)
    )
    assert manifest.triangle_layers == (1, 2)
    assert manifest.pattern == TrianglePattern(2, 6, 3)
    assert (manifest.target, manifest.cache_dtype) == ("cpu", "float32")
    assert manifest.position_ids == ("position_ids" if model.has_position_ids else None)
    assert manifest.left_padding == model.has_position_ids
    assert manifest.shared_cache
    assert manifest.context_length == 2048
    session = Session.of(tmp_path / "out")
    assert {manifest.input_ids, manifest.attention_mask, manifest.prompt_length} < session.inputs
    assert session.logits(random_ids(1, 5)).shape == (1, 5, model.vocab_size)


def test_report_lists_every_layer_and_the_gain(tmp_path: Path) -> None:
    model = tiny_model("llama", "dynamo-sdpa-20")
    pattern = PatternRequest(4, 30, 10)
    export_to(model.path, tmp_path / "out", layers=(2,), pattern=pattern, prompt_length=200)
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert [row["action"] for row in report["layers"]] == ["dense", "dense", "triangle"]
    assert report["triangle_layers"] == [2]
    row = report["layers"][2]
    assert row["form"] == "softmax"
    assert (row["num_heads"], row["kv_num_heads"], row["head_size"]) == (4, 2, 16)
    assert row["mask"] == "causal"
    assert row["reason"] == "--layers"
    assert "Softmax" in row["node"]
    assert row["runs_as"] == "TriangleAttention"
    kept = int(keep_mask(200, TrianglePattern(4, 30, 10)).sum())
    causal = 200 * 201 // 2
    flops = 2 * 4 * (16 + 16)
    assert report["cost"]["dense_flops"] == 3 * causal * flops
    assert report["cost"]["triangle_flops"] == (2 * causal + kept) * flops
    assert report["cost"]["share"] == pytest.approx((2 * causal + kept) / (3 * causal))


def test_context_length_of_any_config(tmp_path: Path) -> None:
    companions = Companions((tmp_path,))
    assert read_context_length(companions) is None
    for content, expected in (
        ({"max_position_embeddings": 77}, 77),
        ({"n_positions": 12}, 12),
        ({"text_config": {"max_position_embeddings": 5}}, 5),
        ({"max_position_embeddings": None}, None),
        ({"llm_config": {"seq_length": 6}}, 6),
        ([1], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert read_context_length(companions) == expected
    (tmp_path / "config.json").write_text("{")
    assert read_context_length(companions) is None
    for genai, expected in (
        ({"search": {"max_length": 9}}, 9),
        ({"model": {"context_length": 64}, "search": {"max_length": 9}}, 64),
        ({"model": None}, None),
    ):
        (tmp_path / "genai_config.json").write_text(json.dumps(genai))
        assert read_context_length(companions) == expected
    (tmp_path / "genai_config.json").write_text('{"model": {"context_length": 64}}')
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 77}')
    assert read_context_length(companions) == 64


def test_the_prediction_stays_within_the_context(tmp_path: Path) -> None:
    path = save_example(PATTERN.example().model, tmp_path / "source")
    assert export_to(path, tmp_path / "a", layers=(1,)).cost.prompt_length == 32768
    (path.parent / "config.json").write_text('{"max_position_embeddings": 2048}')
    report = export_to(path, tmp_path / "b", layers=(1,))
    assert (report.cost.prompt_length, report.warnings) == (2048, ())
    report = export_to(path, tmp_path / "c", layers=(1,), prompt_length=4000)
    assert report.warnings == (
        "the prediction is for 4000 tokens, but the model's context is 2048",
    )
