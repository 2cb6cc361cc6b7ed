"""Models take turns, a stopped evaluation goes on, and progress is told without a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix import command_line
from trianglemix.command_line import progress_bar, wide_console
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation import huggingface
from trianglemix.evaluation.cli import main
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.model import Answer
from trianglemix.evaluation.record import Record
from trianglemix.evaluation.run import Setup, run_models
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.runtime.tokenizer import Tokenizer

from tests.commands import Finished, run_main
from tests.tiny_models import tiny_folder

SETUP: Final = Setup(pick_tasks(["vt", "niah_single_1"]), 900, 3)
Told = list[tuple[str, str]]


class _Model:
    """Answers with its name; says to `told` that it was asked, and stops when told to."""

    def __init__(self, name: str, told: Told, tokenizer: Tokenizer, stop_after: int) -> None:
        self._name, self._told, self.tokenizer, self._stop = name, told, tokenizer, stop_after

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"kind": self._name}

    def answer(self, ids: tuple[int, ...], max_new_tokens: int) -> Answer:
        if len(self._told) == self._stop:
            raise KeyboardInterrupt
        self._told.append((self._name, self.tokenizer.decode(ids)))
        return Answer(f"{self._name} {len(self._told)}", len(ids), 0.5)

    def peak_memory_mb(self) -> float | None:
        return 7.0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(tiny_folder("llama"))
    assert found is not None
    return found


def _models(
    told: Told, tokenizer: Tokenizer, stop_after: int = -1
) -> list[tuple[str, Callable[[], _Model]]]:
    def loader(name: str) -> Callable[[], _Model]:
        return lambda: _Model(name, told, tokenizer, stop_after)

    return [(name, loader(name)) for name in ("dense", "triangle")]


def test_models_are_asked_each_sample_in_turn(tokenizer: Tokenizer) -> None:
    told: Told = []
    runs = run_models(_models(told, tokenizer), SETUP, lambda text: None)
    names = [name for name, _ in told]
    assert names == ["dense", "triangle", "triangle", "dense"] * 3
    prompts = [prompt for _, prompt in told]
    assert prompts[::2] == prompts[1::2], "both get a sample before the next one"
    assert [run.name for run in runs] == ["dense", "triangle"]
    assert [o.answer for o in runs[0].outcomes] == [f"dense {n}" for n in (1, 4, 5, 8, 9, 12)]
    assert [run.peak_memory_mb for run in runs] == [None, None], "whose memory is it?"
    (alone,) = run_models(_models([], tokenizer)[:1], SETUP, lambda text: None)
    assert alone.peak_memory_mb == 7.0


def test_what_was_asked_is_not_asked_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It stops in the middle of the third pair, whose first answer is of another moment then."""
    record = Record(tmp_path / "kept.jsonl", {"tokens": 900, "models": ["a", "b"]})
    first, second, progress = Told(), Told(), list[str]()
    with pytest.raises(KeyboardInterrupt):
        run_models(_models(first, tokenizer, 5), SETUP, lambda text: None, record)
    assert len(record.load()) == 2
    runs = run_models(_models(second, tokenizer), SETUP, progress.append, record)
    assert len(first) == 5
    assert len(second) == 12 - 4
    assert [o.answer for o in runs[0].outcomes[:3]] == ["dense 1", "dense 4", "dense 1"]
    assert len(progress) == 12
    assert [prompt for _, prompt in second[:2]] == [first[4][1]] * 2
    uninterrupted: Told = []
    whole = run_models(_models(uninterrupted, tokenizer), SETUP, lambda text: None)
    for run, other in zip(runs, whole, strict=True):
        assert [(o.task, o.seed) for o in run.outcomes] == [
            (o.task, o.seed) for o in other.outcomes
        ]


def test_a_cut_line_is_asked_again_and_another_setting_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record = Record(tmp_path / "kept.jsonl", {"tokens": 900, "models": ["a", "b"]})
    run_models(_models([], tokenizer), SETUP, lambda text: None, record)
    text = record.path.read_text()
    record.path.write_text(text[:-20])
    assert len(record.load()) == 5
    told: Told = []
    run_models(_models(told, tokenizer), SETUP, lambda text: None, record)
    assert len(told) == 2
    assert len(record.load()) == 6
    other = Record(record.path, {"tokens": 1200, "models": ["a", "b"]})
    with pytest.raises(ConfigurationError, match=r"tokens 900, now 1200\); delete it"):
        other.load()
    record.path.write_text('{"tok')
    assert record.load() == {}, "nothing whole was written"
    record.path.write_text("nonsense\n")
    with pytest.raises(ConfigurationError, match="another evaluation"):
        record.load()


def _command(output: Path, *more: str | Path) -> Finished:
    arguments = ["--tasks", "vt", "--tokens", "900", "--samples", "4", "--layers", "1,2"]
    return run_main(main, tiny_folder("llama"), "-o", output, *arguments, *more)


def test_the_command_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = [0], HuggingFaceModel.answer

    def interrupted(self: HuggingFaceModel, ids: tuple[int, ...], new: int) -> Answer:
        asked[0] += 1
        if asked[0] == 4:
            raise KeyboardInterrupt
        return answer(self, ids, new)

    monkeypatch.setattr(HuggingFaceModel, "answer", interrupted)
    output = tmp_path / "result.json"
    stopped = _command(output)
    assert stopped.code == 130
    assert "interrupted; answers so far are kept" in stopped.err.splitlines()[-1]
    kept = tmp_path / "result-unfinished.jsonl"
    assert len(kept.read_text().splitlines()) == 1 + 1
    refused = _command(output, "--tokens", "1000")
    assert refused.code == 1
    assert "tokens 900, now 1000" in refused.err
    layers = _command(output, "--layers", "1")
    assert layers.code == 1
    assert "holds answers of another evaluation" in layers.err
    went_on = _command(output)
    assert went_on.code == 0, went_on.err
    assert "holds 1 samples that were asked before" in went_on.err
    assert asked[0] == 4 + 6
    assert not kept.exists()
    content = json.loads(output.read_text())
    again = _command(tmp_path / "again.json")
    assert again.code == 0
    whole = json.loads((tmp_path / "again.json").read_text())
    for found, expected in zip(content["models"], whole["models"], strict=True):
        assert [o["answer"] for o in found["outcomes"]] == [
            o["answer"] for o in expected["outcomes"]
        ]
    assert [m["peak_memory_mb"] for m in content["models"]] == [None, None]
    ratio = content["rows"][0]["ttft_ratio"]
    assert ratio["median"] > 0
    assert ratio["low"] is None, "four pairs have no interval"


def test_a_model_beside_itself_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = huggingface.load_causal_model
    monkeypatch.setattr(
        huggingface, "load_causal_model", lambda *given: loaded.append(given) or load(*given)
    )
    assert _command(tmp_path / "result.json").code == 0
    assert len(loaded) == 1
    folder = tiny_folder("llama")
    options = HuggingFaceOptions("cpu", "float32", (1, 2), TrianglePattern(4, 24, 8))
    triangle = HuggingFaceModel(folder, options)
    dense = HuggingFaceModel(folder, HuggingFaceOptions("cpu", "float32"), triangle)
    pairs = zip(triangle.model.parameters(), dense.model.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    ids = tuple(range(3, 200)) * 4
    alone = HuggingFaceModel(folder, HuggingFaceOptions("cpu", "float32"))
    assert triangle.answer(ids, 8).text != alone.answer(ids, 8).text
    assert dense.answer(ids, 8).text == alone.answer(ids, 8).text


def test_one_at_a_time_tells_memory_and_compares_no_times(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    result = _command(output, "--one-at-a-time")
    assert result.code == 0, result.err
    content = json.loads(output.read_text())
    assert [model["name"] for model in content["models"]] == ["dense", "2 triangle layers"]
    assert content["rows"][0]["ttft_ratio"] is None
    assert all(model["peak_memory_mb"] > 0 for model in content["models"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.html", "result.json"]


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar(wide_console(stderr=True)) as bar:
        task = bar.add_task("loading [b]", total=3)
        for number in range(3):
            bar.update(task, advance=1, description=f"dense: vt {number}")
        bar.update(task, completed=3)
    assert capsys.readouterr().err.splitlines() == ["loading [b]", "dense: vt 2: 3 of 3"]
    monkeypatch.setattr(command_line, "_LINE_SECONDS", 0.0)
    with progress_bar(wide_console(stderr=True)) as bar:
        task = bar.add_task("loading", total=3)
        for number in range(3):
            bar.update(task, advance=1, description=f"vt {number}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "loading", "vt 0: 1 of 3", "vt 1: 2 of 3", "vt 2: 3 of 3"
    ]  # fmt: skip
