"""`trianglemix-eval` asks vLLM's server with the plug-in: the answers of `patch()`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.evaluation.cli import main
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.run import Setup, run_model
from trianglemix.evaluation.task_list import pick_tasks

from tests.commands import run_main
from tests.vllm_plugin.served_models import LAYERS, PATTERN, needs_vllm, served_folder
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
