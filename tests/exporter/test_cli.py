"""The command line: exit codes, one-line errors, nothing half-written, what is printed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.exporter.layers.plan import Fingerprint, Plan
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.registry import all_targets
from trianglemix.manifest.manifest import Manifest

from tests.exporter import odd_models
from tests.exporter.command import Captured, Patch, assert_failed, run_main
from tests.exporter.exports import save_example


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_example(PATTERN.example().model, tmp_path / "source")


def test_done_is_zero(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    assert run_main(monkeypatch, source, "-o", tmp_path / "out", "--layers", "1-2") == 0
    printed = capsys.readouterr().out
    assert "triangle" in printed
    assert "softmax" in printed
    assert str(tmp_path / "out") in printed
    assert Manifest.load(tmp_path / "out").triangle_layers == (1, 2)


def test_help_says_what_each_target_is(monkeypatch: Patch, capsys: Captured) -> None:
    assert run_main(monkeypatch, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, target in all_targets().items():
        assert f"{name}: {target.summary}" in printed


def test_quiet_prints_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    assert run_main(monkeypatch, source, "-o", tmp_path / "out", "--layers", "1", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_dry_run_writes_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run_main(monkeypatch, source, "--dry-run", "--layers", "1") == 0
    assert "nothing is dropped up to 648 tokens" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_explain_lists_near_misses(tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    path = save_example(odd_models.bidirectional().model, tmp_path / "source")
    assert run_main(monkeypatch, path, "-o", tmp_path / "out", "--explain") == 1
    captured = capsys.readouterr()
    assert captured.out.count("attention not understood:") == 3
    assert "neither causal" in captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--window", "0"],
        ["--window", "-1"],
        ["--sink", "-1"],
        ["--last", "0"],
        ["--layers", "1", "--start-layer", "1"],
        ["--layers", "1", "--plan", "x.json"],
        ["--layers", "one"],
        ["--dense", "--layers", "1"],
        ["--target", "toaster"],
        ["--prompt-length", "0"],
        ["--dry-run", "--verify"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_two(
    arguments: list[str],
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    assert run_main(monkeypatch, source, "-o", tmp_path / "out", *arguments) == 2
    assert_failed(capsys, tmp_path)


def test_no_output_is_wrong_usage(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    assert run_main(monkeypatch, source) == 2
    assert_failed(capsys, tmp_path, "-o FOLDER")


def _truncated(folder: Path) -> Path:
    path = save_example(PATTERN.example().model, folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def _empty(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(b"")
    return path


def _noise(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(4000))
    return path


def _image_model(folder: Path) -> Path:
    pixels = ir.Value(
        name="pixel_values",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(["batch", 3, 32, 32]),
    )
    node = ir.node("Relu", [pixels])
    node.outputs[0].name = "features"
    graph = ir.Graph([pixels], node.outputs, nodes=[node], opset_imports={"": 18}, name="image")
    return save_example(ir.Model(graph, ir_version=8), folder)


def _no_attention(folder: Path) -> Path:
    model = PATTERN.example().model
    graph = model.graph
    embedded = next(node for node in graph if node.op_type == "Gather").outputs[0]
    logits = graph.outputs[0].producer()
    assert logits is not None
    logits.replace_input_with(0, embedded)
    del graph.outputs[1:]
    for value in list(graph.inputs)[2:]:
        graph.inputs.remove(value)
    kept = {embedded.producer(), logits}
    for node in reversed(list(graph)):
        if node not in kept:
            graph.remove(node, safe=True)
    return save_example(model, folder)


def _nothing(folder: Path) -> Path:
    return folder / "model.onnx"


def _folder_of_nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_truncated, ["not a readable ONNX file"]),
        (_empty, ["holds no graph"]),
        (_noise, ["not a readable ONNX file"]),
        (_image_model, ["input_ids", "pixel_values"]),
        (_no_attention, ["no attention"]),
        (_nothing, ["does not exist"]),
        (_folder_of_nothing, ["neither an ONNX model nor"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_sources_are_one(
    make: object,
    words: list[str],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    assert callable(make)
    path = make(tmp_path / "source")
    assert run_main(monkeypatch, path, "-o", tmp_path / "out") == 1
    assert_failed(capsys, tmp_path, *words)


def test_a_plan_for_another_model(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    plan = tmp_path / "plan.json"
    Plan("Other", Fingerprint(40, 8, 2, 64), triangle_layers=(39,)).save(plan)
    assert run_main(monkeypatch, source, "-o", tmp_path / "out", "--plan", plan) == 1
    assert_failed(capsys, tmp_path, "Other", "num_layers 40 != 3")


def test_an_unwritable_output(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"
    assert run_main(monkeypatch, source, "-o", output, "--layers", "1") == 1
    assert_failed(capsys, tmp_path, "cannot be written")


def test_outputs_are_not_overwritten(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    keep = tmp_path / "out" / "letter.txt"
    keep.parent.mkdir()
    keep.write_text("dear")
    for force in ([], ["--force"]):
        command = [source, "-o", keep.parent, "--layers", "1", *force]
        assert run_main(monkeypatch, *command) == 1
        assert "not empty and holds no earlier export" in capsys.readouterr().err
    assert keep.read_text() == "dear"
    keep.unlink()
    assert run_main(monkeypatch, source, "-o", keep.parent, "--layers", "1") == 0
    assert run_main(monkeypatch, source, "-o", keep.parent, "--layers", "2") == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert Manifest.load(keep.parent).triangle_layers == (1,)
    assert run_main(monkeypatch, source, "-o", keep.parent, "--layers", "2", "--force") == 0
    assert Manifest.load(keep.parent).triangle_layers == (2,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_current_folder_stays_the_same_folder(
    source: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    """A rename over it would leave the shell in a deleted folder; a mount point goes this way."""
    place = tmp_path / "out"
    place.mkdir()
    monkeypatch.chdir(place)
    assert run_main(monkeypatch, source, "-o", ".", "--layers", "1", "--quiet") == 0
    assert Path("manifest.json").is_file()
    first = sorted(path.name for path in Path().iterdir())
    Path("model.onnx").write_bytes(b"old")
    assert run_main(monkeypatch, source, "-o", ".", "--layers", "1", "--quiet") == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert run_main(monkeypatch, source, "-o", ".", "--layers", "1", "--quiet", "--force") == 0
    assert sorted(path.name for path in Path().iterdir()) == first
    assert Path("model.onnx").read_bytes() != b"old"
    assert not list(tmp_path.glob(".*"))


def test_the_source_folder_is_no_output(
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Captured,
) -> None:
    before = source.read_bytes()
    assert run_main(monkeypatch, source, "-o", source.parent, "--layers", "1", "--force") == 1
    assert "the source's own folder" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert [path.name for path in source.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(("signal_", "clean"), [(signal.SIGINT, True), (signal.SIGTERM, True),
                                                (signal.SIGKILL, False)])  # fmt: skip
def test_an_interrupt_leaves_nothing_finished(
    signal_: signal.Signals, clean: bool, source: Path, tmp_path: Path
) -> None:
    """Stopped in the middle of writing; the next export goes through as if nothing had been."""
    script = (
        "import time, sys, trianglemix.exporter.targets._onnx_runtime as p\n"
        "def slow(model, source, folder, *rest):\n"
        "    (folder / 'model.onnx').write_bytes(b'half'); time.sleep(60)\n"
        "p.save_model = slow\n"
        "from trianglemix.exporter.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, source, "-o", tmp_path / "out", "--layers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out*/model.onnx")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal_)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if clean else -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("**/manifest.json"))
    if clean:
        assert error.strip() == "trianglemix-export: error: interrupted; nothing was written"
        assert not list(tmp_path.glob(".out*"))
    again = subprocess.run([sys.executable, "-m", "trianglemix.exporter.cli", *command[3:]],
                           check=False, capture_output=True)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_help_is_zero(monkeypatch: Patch, capsys: Captured) -> None:
    assert run_main(monkeypatch, "--help") == 0
    assert "--num-triangle-layers" in capsys.readouterr().out
