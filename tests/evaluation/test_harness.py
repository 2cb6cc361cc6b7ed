"""lm-evaluation-harness's own command line, on local tasks: the numbers are the ONNX graph's.

It runs in an environment of its own, for its fifty packages: `make harness` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.evaluation.onnx_likelihood import (
    BEGINNING,
    CONTEXT,
    TOLERANCE,
    OnnxLikelihood,
    export_small_folder,
)
from tests.tiny_models import tiny_folder

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENT: Final = ROOT / "build" / "envs" / "harness"
needs_harness: Final = pytest.mark.skipif(
    not (ENVIRONMENT / "complete").is_file(),
    reason="the harness's model type is not tested: no build/envs/harness, run `make harness`",
)

FILLER: Final = "a number is hidden in a text that is long enough to lose its middle"
QUESTIONS: Final = (
    ("is it", ("a", "no, b", "c d"), 1),
    (FILLER, ("17", "an 8", "none of these"), 0),
    (FILLER * 3, ("x", "yy"), 1),  # longer than the context
)
NEW_TOKENS: Final = 12
TASKS: Final = ("tm_choice", "tm_until", "tm_rolling")
_COMMON: Final = {"dataset_path": "json", "test_split": "test"}
_BY_KIND: Final[dict[str, dict[str, Any]]] = {
    "tm_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "tm_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{expected}}",
        "metric_list": [{"metric": "exact_match"}],
    },
    "tm_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@dataclass(frozen=True)
class Run:
    """What the harness wrote: `results.json`, and each task's samples in their order."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small_folder(tmp_path_factory.mktemp("harness") / "tiny")


@pytest.fixture(scope="module")
def onnx(folder: Path) -> OnnxLikelihood:
    return OnnxLikelihood(folder)


@pytest.fixture(scope="module")
def stop(onnx: OnnxLikelihood) -> str:
    """Where the second question's answer is to end: in its middle."""
    answer = onnx.answer(FILLER, NEW_TOKENS)
    found = answer[5]
    assert 0 < answer.index(found) < len(answer) - 1
    return found


@pytest.fixture(scope="module")
def tasks(onnx: OnnxLikelihood, stop: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data; the expected answers are the graph's own."""
    path = tmp_path_factory.mktemp("tasks")
    lines = [
        {"question": question, "choices": choices, "answer": answer,
         "expected": onnx.answer(question, NEW_TOKENS).split(stop)[0]}
        for question, choices, answer in QUESTIONS
    ]  # fmt: skip
    data = path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, kind in _BY_KIND.items():
        task = {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        task |= _COMMON | kind
        if name == "tm_until":
            task["generation_kwargs"] = {"until": [stop], "max_gen_toks": NEW_TOKENS}
        (path / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def plain(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(_ours(folder), tasks, TASKS, tmp_path_factory.mktemp("plain"))


def _harness(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command that docs/layers.md shows; nothing may be fetched."""
    work.mkdir(exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home")}
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "trianglemix.evaluation.harness"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=work,
        env=os.environ | offline | {"PYTHONPATH": ""},
        timeout=300,
    )


def _ours(folder: Path) -> list[str]:
    return ["--model", "trianglemix", "--model_args", f"folder={folder},provider=cpu,threads=1"]


def _run(model: list[str], tasks: Path, names: Sequence[str], work: Path, *more: str) -> Run:
    done = _harness(
        work, *model, "--include_path", str(tasks), "--tasks", ",".join(names),
        "--output_path", str(work / "out"), "--log_samples", *more,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (results,) = (work / "out").rglob("results_*.json")
    samples = {}
    for name in names:
        (path,) = results.parent.glob(f"samples_{name}_*.jsonl")
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(found, key=lambda sample: int(sample["doc_id"]))
    return Run(json.loads(results.read_text(encoding="utf-8")), samples)


def _check_choices(samples: list[dict[str, Any]], onnx: OnnxLikelihood) -> list[list[float]]:
    """Every choice's log-likelihood is the graph's; returns those of the graph."""
    expected = []
    for sample in samples:
        asked = [(given["arg_0"], given["arg_1"]) for given in sample["arguments"].values()]
        logs = [onnx.continuation(context, choice) for context, choice in asked]
        found = [(float(log), greedy == "True") for ((log, greedy),) in sample["resps"]]
        assert [log for log, _ in found] == pytest.approx([x for x, _ in logs], abs=TOLERANCE)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in logs]
        expected.append([log for log, _ in logs])
    return expected


@needs_harness
def test_choices_score_as_in_the_graph(plain: Run, onnx: OnnxLikelihood) -> None:
    samples = plain.samples["tm_choice"]
    assert [len(sample["resps"]) for sample in samples] == [3, 3, 2]
    assert samples[1]["arguments"]["gen_args_0"] == {"arg_0": FILLER, "arg_1": " 17"}
    logs = _check_choices(samples, onnx)
    right = [int(np.argmax(row)) == q[2] for row, q in zip(logs, QUESTIONS, strict=True)]
    assert plain.results["results"]["tm_choice"]["acc,none"] == pytest.approx(np.mean(right))
    dense = [onnx.dense_continuation(FILLER, f" {choice}") for choice in QUESTIONS[1][1]]
    assert np.abs(np.subtract(dense, logs[1])).max() > 0.05, "the middle is dropped"


@needs_harness
def test_answers_stop_where_the_task_says(plain: Run, onnx: OnnxLikelihood, stop: str) -> None:
    found = [sample["resps"][0][0] for sample in plain.samples["tm_until"]]
    assert found == [onnx.answer(q, NEW_TOKENS).split(stop)[0] for q, _, _ in QUESTIONS]
    assert len(found[1]) < len(onnx.answer(FILLER, NEW_TOKENS))
    assert plain.results["results"]["tm_until"]["exact_match,none"] == 1.0


@needs_harness
def test_perplexity_is_that_of_the_text_as_a_prompt(plain: Run, onnx: OnnxLikelihood) -> None:
    expected = []
    for question, _, _ in QUESTIONS:
        read = [BEGINNING, *onnx.encode(question)]
        first, last = min(CONTEXT, len(question)), len(question)
        total = onnx.window(read[:first], read[1 : first + 1])
        if last > CONTEXT:  # a second window, filled up with text that the first has scored
            total += onnx.window(read[last - CONTEXT : last], read[first + 1 : last + 1])
        expected.append(total)
    found = [float(sample["resps"][0][0]) for sample in plain.samples["tm_rolling"]]
    assert found == pytest.approx(expected, abs=TOLERANCE)
    perplexity = np.exp(-sum(expected) / sum(len(question) for question, _, _ in QUESTIONS))
    reported = plain.results["results"]["tm_rolling"]["byte_perplexity,none"]
    assert reported == pytest.approx(perplexity, rel=1e-4)


@needs_harness
def test_the_record_says_what_ran(plain: Run) -> None:
    config = plain.results["config"]
    assert (config["model"], config["provider"], config["kernel"]) == (
        "trianglemix",
        "cpu",
        "native",
    )
    assert (config["triangle_layers"], config["layers"]) == ([1, 2], 3)
    assert config["pattern"]["sliding_window_size"] == 24
    assert (config["block_sparse_layers"], config["block_rule"]) == ([], None)


@needs_harness
def test_a_dense_export_scores_as_the_harness_s_own_model_type(tasks: Path, tmp_path: Path) -> None:
    """What begins a text, windows, blanks and cuts are the same as in its torch model type."""
    dense = export_small_folder(tmp_path / "dense", dense=True)
    ours = _run(_ours(dense), tasks, TASKS, tmp_path / "ours")
    settings = f"pretrained={tiny_folder('llama')},dtype=float32,max_length={CONTEXT}"
    torch_model = ["--model", "hf", "--model_args", settings, "--device", "cpu"]
    theirs = _run(torch_model, tasks, TASKS, tmp_path / "theirs")
    assert theirs.results["config"]["model"] == "hf"
    for name in ("tm_choice", "tm_rolling"):
        assert _logs(ours.samples[name]) == pytest.approx(
            _logs(theirs.samples[name]), abs=TOLERANCE
        )
    answers = [[s["resps"] for s in run.samples["tm_until"]] for run in (ours, theirs)]
    assert answers[0] == answers[1]


def _logs(samples: list[dict[str, Any]]) -> list[float]:
    """Every log-likelihood; one of a choice stands beside whether it is greedy."""
    found = [answer for sample in samples for (answer,) in sample["resps"]]
    return [float(answer if isinstance(answer, str) else answer[0]) for answer in found]


@needs_harness
def test_chat_templates_and_kept_answers(
    folder: Path, tasks: Path, onnx: OnnxLikelihood, tmp_path: Path
) -> None:
    """`--apply_chat_template`, `--use_cache`, and sampling instead of greedy answers."""
    kept = ["--use_cache", str(tmp_path / "answers")]
    more = [*kept, "--apply_chat_template", "--gen_kwargs", "do_sample=true,temperature=3.0"]
    chat = _run(_ours(folder), tasks, ("tm_choice", "tm_until"), tmp_path, *more)
    first = chat.samples["tm_choice"][1]["arguments"]["gen_args_0"]["arg_0"]
    assert first == f"<|user|>{FILLER}<|end|><|assistant|>"
    _check_choices(chat.samples["tm_choice"], onnx)
    assert list(tmp_path.glob("answers*.db"))
    assert chat.results["results"]["tm_until"]["exact_match,none"] < 1.0, "drawn, not greedy"


@needs_harness
def test_refusals_are_one_line(folder: Path, tmp_path: Path) -> None:
    model = ["--model", "trianglemix", "--model_args", f"folder={folder},providr=cpu"]
    done = _harness(tmp_path, *model, "--tasks", "arc_easy")
    assert done.returncode == 1
    assert "error: --model_args names providr" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_the_harness_one_line_says_what_to_install() -> None:
    """This environment lacks it, or is made to."""
    code = (
        "import runpy, sys\n"
        "sys.modules['lm_eval'] = None\n"
        "runpy.run_module('trianglemix.evaluation.harness', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: lm-evaluation-harness")
    assert "pip install 'trianglemix[harness]'" in done.stderr
    assert done.stderr.count("\n") == 1
