"""A served model is asked what a local one is asked, and judged alike; errors are one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.cli import main
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.exporter.layers.plan import Fingerprint, Plan

from tests.commands import Finished, run_main
from tests.evaluation.stand_in_server import StandIn, serving
from tests.tiny_models import tiny_folder

PATTERN: Final = TrianglePattern(4, 24, 8)
LAYERS: Final = (1, 2)
SMALL: Final = ("--tasks", "vt,niah_single_1", "--tokens", "900", "--samples", "3")


@pytest.fixture(scope="module")
def dense_model() -> HuggingFaceModel:
    return HuggingFaceModel(tiny_folder("llama"), HuggingFaceOptions("cpu", "float32"))


@pytest.fixture(scope="module")
def triangle_model() -> HuggingFaceModel:
    options = HuggingFaceOptions("cpu", "float32", LAYERS, PATTERN)
    return HuggingFaceModel(tiny_folder("llama"), options)


@pytest.fixture
def dense(dense_model: HuggingFaceModel) -> Iterator[StandIn]:
    with serving(StandIn(dense_model, str(tiny_folder("llama")))) as served:
        yield served


@pytest.fixture
def triangle(triangle_model: HuggingFaceModel) -> Iterator[StandIn]:
    with serving(StandIn(triangle_model, str(tiny_folder("llama")))) as served:
        yield served


def _answers(content: dict[str, Any]) -> list[list[tuple[str, int, str]]]:
    return [
        [(o["answer"], o["prompt_tokens"], o["task"]) for o in model["outcomes"]]
        for model in content["models"]
    ]


def test_two_endpoints_are_compared_as_two_local_models_are(
    dense: StandIn, triangle: StandIn, tmp_path: Path
) -> None:
    output, plan = tmp_path / "served.json", tmp_path / "plan.json"
    places = ["--served", triangle.address, "--against", dense.address]
    done = run_main(main, *places, "-o", output, *SMALL)
    assert done.code == 0, done.err
    Plan("tiny", Fingerprint(3, 4, 2, 16), PATTERN, triangle_layers=LAYERS).save(plan)
    local = tmp_path / "local.json"
    source = [tiny_folder("llama"), "--plan", plan, "--dtype", "float32"]
    assert run_main(main, *source, "-o", local, *SMALL).code == 0
    found, expected = (json.loads(path.read_text()) for path in (output, local))
    assert _answers(found) == _answers(expected)
    assert _answers(found)[0] != _answers(found)[1]
    assert [row["difference"] for row in found["rows"]] == [
        row["difference"] for row in expected["rows"]
    ]
    assert [model["triangle_layers"] for model in found["models"]] == [[], [1, 2]]
    assert [model["kind"] for model in found["models"]] == ["served", "served"]
    names = [model["name"] for model in found["models"]]
    assert names == [f"tiny at {s.address[7:-3]}" for s in (dense, triangle)]
    asked = triangle.asked[1:]  # after the trial
    assert all(request["temperature"] == 0 and request["stream"] for request in asked)
    assert len({request["cache_salt"] for request in asked}) == len(asked) == 6
    assert [model["block_sparse_layers"] for model in found["models"]] == [[], []]


def test_an_endpoint_beside_a_folder(dense: StandIn, tmp_path: Path) -> None:
    """Either may be the baseline; one that is not vLLM is asked without vLLM's own fields."""
    dense.owner, dense.has_metrics = "somebody", False
    output = tmp_path / "result.json"
    folder = ["--dtype", "float32", "-o", output, *SMALL]
    places: tuple[list[Any], ...] = (
        ["--served", dense.address, "--against", tiny_folder("llama")],
        [tiny_folder("llama"), "--against", dense.address, "--tokenizer", tiny_folder("llama")],
    )
    for place in places:
        done = run_main(main, *place, *folder)
        assert done.code == 0, done.err
        answers = _answers(json.loads(output.read_text()))
        assert answers[0] == answers[1]
    assert not any("cache_salt" in request for request in dense.asked)
    assert "not told" in output.with_suffix(".html").read_text(), "which layers, nobody says"
    assert {m["kind"] for m in json.loads(output.read_text())["models"]} == {"served", "PyTorch"}


def test_the_time_is_that_of_the_first_token(dense: StandIn, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    small = ("--served", dense.address, "-o", output, "--tasks", "vt", "--tokens", "900",
             "--samples", "1")  # fmt: skip
    dense.seconds_after_first = 0.5
    assert run_main(main, *small).code == 0
    early = json.loads(output.read_text())["models"][0]["median_ttft_s"]
    dense.seconds_after_first, dense.seconds_before_first = 0.0, 0.5
    assert run_main(main, *small).code == 0
    late = json.loads(output.read_text())["models"][0]["median_ttft_s"]
    assert early < 0.45 < 0.5 <= late


def test_the_key_of_the_environment_is_sent(
    dense: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense.key = "a-secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refused = _served(dense, tmp_path)
    assert refused.code == 1
    assert "refuses the key (401: Unauthorized); set OPENAI_API_KEY" in refused.err
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    assert _served(dense, tmp_path).code == 0
    assert "a-secret" not in (tmp_path / "result.json").read_text()


def _served(server: StandIn, tmp_path: Path, *more: str | Path) -> Finished:
    output = tmp_path / "result.json"
    return run_main(main, "--served", server.address, "-o", output, *SMALL, *more)


@pytest.mark.parametrize(
    ("changes", "more", "reason"),
    [
        ({}, ["--served-model", "other"], "serves no 'other', but tiny"),
        ({"models": ("tiny", "lora")}, [], "serves tiny, lora; name one with --served-model"),
        ({"models": None}, [], "has no list of models; name the model with --served-model"),
        ({"models": None, "name": "a"}, ["--served-model", "b"], "404: The model `b` does not"),
        ({"context": 800}, [], "up to 900 tokens, but tiny is served at"),
        ({"context": 800}, [], "with a context of 800"),
        ({"takes_ids": False}, [], "answers 400: prompt: Input should be a valid string (a prompt"),
        ({"added_tokens": 1}, [], "it takes no token ids as they are"),
        ({"root": "someone/tiny"}, [], "someone/tiny is no folder here; give --tokenizer"),
        ({"breaks_after": 3, "how_it_breaks": "error"}, [], "broke off: EngineCore died"),
        ({"breaks_after": 3, "how_it_breaks": "nonsense"}, [], "sends what is no event"),
        ({"breaks_after": 3}, [], "broke off: Response ended prematurely"),
        ({"seconds_after_first": 2.0}, ["--timeout", "0.3"], "said nothing for 0.3 s"),
        ({"seconds_before_first": 2.0}, ["--timeout", "0.3"], "said nothing for 0.3 s"),
    ],
)
def test_what_goes_wrong_is_one_line(
    dense: StandIn, tmp_path: Path, changes: dict[str, Any], more: list[str], reason: str
) -> None:
    if changes.get("models", "") is None:
        more = [*more, "--tokenizer", str(tiny_folder("llama"))]
    for name, value in changes.items():
        setattr(dense, name, value)
    done = _served(dense, tmp_path, *more)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert reason in last
    assert last.startswith("trianglemix-eval: error: ")
    assert "Traceback" not in done.err
    assert not (tmp_path / "result.json").exists()


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for address, reason in (
        ("http://127.0.0.1:9/v1", "no server answers at http://127.0.0.1:9/v1 (Connection refused"),
        ("http://nowhere.invalid/v1", "no server answers at http://nowhere.invalid/v1"),
        ("http://", "is no address"),
    ):
        done = run_main(main, "--served", address, "-o", tmp_path / "r.json")
        assert done.code == 1
        assert reason in done.err.splitlines()[-1]
        assert len(done.err.splitlines()) == 1


def test_a_server_that_broke_off_is_gone_on_with(dense: StandIn, tmp_path: Path) -> None:
    dense.breaks_after = 4  # the trial, and three of six samples
    assert _served(dense, tmp_path).code == 1
    dense.breaks_after = 100
    done = _served(dense, tmp_path)
    assert done.code == 0, done.err
    assert "holds 3 samples that were asked before" in done.err
    assert len(dense.asked) == (1 + 4) + (1 + 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give one model to ask"),
        (["FOLDER", "--served", "http://a/v1"], "give one model to ask"),
        (["--served", "a:8000"], "--served is 'a:8000', but must be an address"),
        (["--served", "http://a/v1", "--layers", "1"], "chosen by its server; leave them out"),
        (["FOLDER", "--tokenizer", "FOLDER"], "--tokenizer is of a served model"),
        (["FOLDER", "--against", "FOLDER", "--against-model", "b"], "--against-model is of"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    given = [str(tiny_folder("llama")) if a == "FOLDER" else a for a in arguments]
    done = run_main(main, *given, "-o", tmp_path / "r.json")
    assert done.code == 2
    assert reason in done.err


def test_ctrl_c_in_the_middle_of_an_answer_is_one_line(dense: StandIn, tmp_path: Path) -> None:
    dense.seconds_after_first = 60.0
    command = [
        sys.executable, "-c", "from trianglemix.commands import evaluate; evaluate()",
        "--served", dense.address, "-o", str(tmp_path / "r.json"), *SMALL,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        deadline = time.monotonic() + 60
        while not dense.asked and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("trianglemix-eval: error: interrupted; answers so far")
    assert "Traceback" not in error
