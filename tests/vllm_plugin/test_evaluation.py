"""`trianglemix-eval` and the harness ask vLLM with the plug-in, which answers as `patch()` does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from trianglemix.evaluation.cli import main
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.run import Setup, run_model
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.pytorch import prompt_length

from tests.commands import run_main
from tests.evaluation.test_harness import ENVIRONMENT as HARNESS
from tests.evaluation.test_harness import needs_harness
from tests.vllm_plugin.served_models import CONTEXT, LAYERS, PATTERN, needs_vllm, served_folder
from tests.vllm_plugin.server import START_SECONDS, serve

pytestmark = needs_vllm
TASKS: Final = ("niah_single_1", "vt")
SETUP: Final = Setup(pick_tasks(TASKS), 900, 3)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve("llama", tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield f"{running.address(START_SECONDS)}/v1"


def _answers(*layers: int) -> list[str]:
    options = HuggingFaceOptions("cpu", "float32", layers, PATTERN)
    folder = served_folder("llama")
    run = run_model("", lambda: HuggingFaceModel(folder, options), SETUP, lambda text: None)
    return [outcome.answer for outcome in run.outcomes]


def test_the_served_model_is_judged_as_the_patched_one(address: str, tmp_path: Path) -> None:
    output, folder = tmp_path / "result.json", served_folder("llama")
    small = ["--tasks", ",".join(TASKS), "--tokens", "900", "--samples", "3", "-o", output]
    done = run_main(main, "--served", address, "--against", folder, "--dtype", "float32", *small)
    assert done.code == 0, done.err
    models: list[dict[str, Any]] = json.loads(output.read_text())["models"]
    dense, served = ([o["answer"] for o in model["outcomes"]] for model in models)
    assert served == _answers(*LAYERS)
    assert dense == _answers()
    assert served != dense
    assert models[1]["triangle_layers"] == list(LAYERS)
    assert (models[1]["kind"], models[1]["served model"]) == ("served", "tiny")
    assert models[1]["root"] == str(folder)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--served-model", "other"], "serves no 'other', but tiny"),
        (["--tokens", "1100"], "with a context of 1024"),
    ],
)
def test_refusals_are_one_line(address: str, tmp_path: Path, more: list[str], reason: str) -> None:
    done = run_main(main, "--served", address, "-o", tmp_path / "r.json", *more)
    assert done.code == 1
    assert reason in done.err.splitlines()[-1]


def _log_likelihood(model: HuggingFaceModel, context: str, continuation: str) -> float:
    """Of the continuation, in a text that is one prompt: the server reads both together."""
    before = model.tokenizer.encode(context)
    ids = model.tokenizer.encode(context + continuation)
    with torch.no_grad(), prompt_length(len(ids)):
        logs = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), -1)
    return float(sum(logs[at - 1, ids[at]] for at in range(len(before), len(ids))))


@needs_harness
def test_the_harness_s_own_model_type_asks_the_server(address: str, tmp_path: Path) -> None:
    """The command of docs/evaluation.md: choices by the log-probabilities of the prompt."""
    questions = tmp_path / "questions.jsonl"
    context = "a number is hidden in a text that is long enough to lose its middle" * 4
    line = {"question": context, "choices": ["17", "an 8"], "answer": 0}
    questions.write_text(json.dumps(line) + "\n", encoding="utf-8")
    task = {
        "task": "tm_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tm_choice.yaml").write_text(json.dumps(task), encoding="utf-8")
    folder = served_folder("llama")
    settings = (
        f"model=tiny,base_url={address}/completions,tokenizer_backend=huggingface,"
        f"tokenizer={folder},max_length={CONTEXT}"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [str(HARNESS / "bin" / "python"), "-m", "lm_eval", "--model", "local-completions",
         "--model_args", settings, "--include_path", str(tmp_path), "--tasks", "tm_choice",
         "--output_path", str(tmp_path / "out"), "--log_samples"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | offline | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_tm_choice_*.jsonl")
    (sample,) = [json.loads(text) for text in samples.read_text().splitlines()]
    found = [float(log) for ((log, _),) in sample["resps"]]
    options = HuggingFaceOptions("cpu", "float32", LAYERS, PATTERN)
    model = HuggingFaceModel(folder, options)
    expected = [_log_likelihood(model, context, f" {choice}") for choice in line["choices"]]
    assert found == pytest.approx(expected, abs=1e-3)
    dense = HuggingFaceModel(folder, HuggingFaceOptions("cpu", "float32"))
    own = [_log_likelihood(dense, context, f" {choice}") for choice in line["choices"]]
    assert found != pytest.approx(own, abs=0.02), "the middle is dropped"
