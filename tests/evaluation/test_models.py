"""Exported folders and Hugging Face models give the same answers, through the command line too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.cli import main
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.likelihood import FolderScorer
from trianglemix.evaluation.model import encode_sample
from trianglemix.evaluation.onnx_model import OnnxModel
from trianglemix.evaluation.task import Sample
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.layers.plan import Fingerprint, Plan
from trianglemix.exporter.options import BlockRequest, ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.runtime.session import TriangleSession

from source_models.tiny_tokenizer import save_tokenizer
from tests.commands import run_main
from tests.end_to_end.test_tiny_llm import SilentObserver
from tests.tiny_models import tiny_folder, tiny_model

PATTERN = TrianglePattern(4, 24, 8)
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with triangle layers 1 and 2, as ONNX."""
    output = tmp_path_factory.mktemp("evaluation") / "tiny"
    options = ExportOptions(
        source=tiny_model("llama").path,
        output=output,
        layers=LayerRequest(layers=LAYERS),
        pattern=PatternRequest(4, 24, 8),
        last_token_logits=True,
    )
    export(options, SilentObserver())
    return output


def test_both_kinds_of_model_answer_the_same(folder: Path) -> None:
    onnx = OnnxModel(folder, "cpu")
    options = HuggingFaceOptions("cpu", "float32", LAYERS, PATTERN)
    torch_model = HuggingFaceModel(tiny_folder("llama"), options)
    sample = Sample("a text that is long enough to lose its middle " * 4, " so", ("x",))
    ids = tuple(encode_sample(onnx.tokenizer, sample))
    assert list(ids) == encode_sample(torch_model.tokenizer, sample)
    ours, theirs = onnx.answer(ids, 12), torch_model.answer(ids, 12)
    assert (ours.text, ours.prompt_tokens) == (theirs.text, len(ids))
    assert theirs.text
    torch_model.use_layers(())
    assert torch_model.answer(ids, 12).text != theirs.text
    assert onnx.facts["triangle_layers"] == list(LAYERS)
    assert (onnx.peak_memory_mb() or 1) > 0


def test_the_prompt_ends_with_the_beginning_of_the_answer(folder: Path) -> None:
    onnx = OnnxModel(folder, "cpu")
    ids = encode_sample(onnx.tokenizer, Sample("the question", " It is", ("x",)))
    text = onnx.tokenizer.decode(ids)
    assert text.endswith("It is")
    assert ids[0] != ids[-len("It is")]
    assert len(ids) == len("the question") + len("It is") + 3  # user, end, assistant


def test_likelihoods_are_those_of_the_source_model(folder: Path) -> None:
    """Short texts lose nothing: they must score as the source model scores them."""
    scorer = FolderScorer(TriangleSession.from_folder(folder, "cpu"))
    source = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32).eval()
    context, continuation = "abc de", " fgh"
    ids = scorer.tokenizer.encode(context + continuation)
    with torch.no_grad():
        logs = torch.log_softmax(source(torch.tensor([ids])).logits[0].double(), -1)
    start = len(scorer.tokenizer.encode(context))
    expected = sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))
    found = scorer.likelihood(context, continuation)
    assert found.logarithm == pytest.approx(expected, abs=1e-3)
    assert not found.greedy
    best = scorer.session.generate(scorer.tokenizer.encode(context), 3).ids
    assert scorer.token_likelihood(scorer.tokenizer.encode(context), best).greedy
    first = scorer.rolling("abcdef")
    assert first < 0
    assert np.isfinite(first)
    answer = scorer.generate(context, (), 8)
    assert scorer.generate(context, (answer[2],), 8) == answer.split(answer[2])[0]


def test_the_command_compares_folders_and_writes_its_page(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ["--tasks", "niah_single_1,vt", "--tokens", "900", "--samples", "2"]
    command = [str(folder), "--against", str(tiny_folder("llama")), "-o", str(output), *arguments]
    result = run_main(main, *command)
    assert result.code == 0, result.err
    content = json.loads(output.read_text())
    assert [row["task"] for row in content["rows"]] == ["niah_single_1", "vt", "all"]
    assert [model["kind"] for model in content["models"]] == ["PyTorch", "ONNX Runtime"]
    assert len(content["models"][1]["outcomes"]) == 4
    page = output.with_suffix(".html").read_text()
    assert "<svg" in page
    assert "http" not in page


def test_block_sparse_layers_of_a_plan_or_of_the_options(tmp_path: Path) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "result.json"
    section = BlockSparsePlan((0,), BlockRule(mass=0.7, min_length=300))
    shape = Fingerprint(3, 4, 2, 16)
    Plan("tiny", shape, PATTERN, triangle_layers=LAYERS, block_sparse=section).save(plan)
    source, small = tiny_folder("llama"), ["--tasks", "vt", "--tokens", "900", "--samples", "1"]

    def facts(*options: str | Path) -> list[dict[str, Any]]:
        result = run_main(main, source, "-o", output, *small, *options)
        assert result.code == 0, result.err
        models: list[dict[str, Any]] = json.loads(output.read_text())["models"]
        return models

    dense, sparse = facts("--plan", plan)
    assert (dense["name"], dense["block_sparse_layers"], dense["density"]) == ("dense", [], None)
    assert sparse["name"] == "2 triangle and 1 block-sparse layers"
    assert (sparse["block_sparse_layers"], sparse["rule"]["mass"]) == ([0], 0.7)
    assert 0.5 < sparse["density"] < 0.99
    assert "of the causal blocks kept" in output.with_suffix(".html").read_text()
    off = facts("--plan", plan, "--block-sparse-layers", "none")[1]
    assert (off["block_sparse_layers"], off["triangle_layers"]) == ([], list(LAYERS))
    assert "dropped nothing" not in output.with_suffix(".html").read_text()
    more = facts("--block-sparse-layers", "0-1", "--mass", "0.5", "--min-length", "100")[1]
    assert (more["name"], more["density"] < sparse["density"]) == ("2 block-sparse layers", True)


def test_prompts_too_short_for_block_sparse_layers_are_told(tmp_path: Path) -> None:
    """A comparison of a model with itself must not look like one that proves something."""
    output = tmp_path / "result.json"
    small = ["--tasks", "vt", "--tokens", "900", "--samples", "1", "--layers", "2"]
    command = [tiny_folder("llama"), "-o", output, *small, "--block-sparse-layers", "0-1"]
    result = run_main(main, *command)
    assert result.code == 0, result.err
    assert "will drop nothing of prompts of up to 900 tokens" in result.err
    words = "dropped nothing of 1 of the 1 prompts"
    assert words in result.err
    assert words in output.with_suffix(".html").read_text()
    assert "drop" not in run_main(main, *command, "--min-length", "0").err
    assert run_main(main, *command[:-1], "").code == 2, "no list is not the plan's"


def test_an_exported_folder_says_its_block_sparse_layers(tmp_path: Path) -> None:
    options = ExportOptions(
        source=tiny_model("llama").path,
        output=tmp_path / "out",
        layers=LayerRequest(layers=(2,)),
        blocks=BlockRequest((0, 1), 0.7, 300),
        last_token_logits=True,
    )
    export(options, SilentObserver())
    facts = OnnxModel(tmp_path / "out", "cpu").facts
    assert (facts["block_sparse_layers"], facts["rule"]["mass"]) == ([0, 1], 0.7)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["SOURCE", "--block-sparse-layers", "8"], "3 layers"),
        (["SOURCE", "--layers", "1", "--mass", "0.5"], "of which there are none"),
        (["FOLDER", "--mass", "0.5"], "leave them out"),
        (["nowhere"], "neither a folder of trianglemix-export"),
        (["FOLDER", "--layers", "1"], "leave them out"),
        (["SOURCE", "--layers", "8"], "3 layers"),
        (["SOURCE", "--device", "nowhere"], "cannot go to the device 'nowhere'"),
    ],
)
def test_refusals_are_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    named = {"FOLDER": str(folder), "SOURCE": str(tiny_folder("llama"))}
    command = [named.get(a, a) for a in arguments] + ["-o", str(tmp_path / "r.json")]
    result = run_main(main, *command, "--samples", "1", "--tokens", "2000")
    assert result.code == 1
    assert reason in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_a_bad_output_is_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "folder.json"
    blocked.mkdir()
    for output, reason in (
        (blocked, "cannot be written"),
        (tmp_path / "page.html", "name a .json file"),
        (tmp_path / "nowhere" / "r.json", "does not exist"),
    ):
        result = run_main(main, folder, "-o", output, "--tasks", "vt")
        assert result.code == 1
        assert reason in " ".join(result.err.split())
        assert "loading" not in result.err
    assert list(tmp_path.iterdir()) == [blocked]


def test_attention_of_a_models_own_code_is_refused_before_the_baseline_runs(tmp_path: Path) -> None:
    sizes = dict(vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=4096)
    config = AutoConfig.for_model("gptj", **sizes, bos_token_id=256, eos_token_id=257)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    output = tmp_path / "result.json"
    result = run_main(main, tmp_path, "--layers", "1", "-o", output, "--tasks", "vt")
    assert result.code == 1
    assert "GPTJForCausalLM does not call transformers' attention interface" in result.err
    assert "dense" not in result.err
    assert not output.exists()
