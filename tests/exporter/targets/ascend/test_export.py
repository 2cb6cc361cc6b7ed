"""The target ascend: any prompt gives what the CPU operator gives, and the lint passes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.targets.ascend.lint import lint_file
from trianglemix.exporter.targets.ascend.lint_model import LengthAxes, Severity
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.exporter.targets.ascend.soc import find_soc
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.backends.static_cache import StaticBackend
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import (
    CHUNK,
    LAST,
    SLOTS,
    Pair,
    Silent,
    export_ascend,
    export_pair,
    last_logits,
    prompt,
    tiny_source,
)
from tests.exporter.targets.ascend.half_model import load_whole, save_half
from tests.tiny_models import PAIRS, tiny_folder

LENGTHS = (1, LAST - 1, LAST, LAST + 1, LAST + CHUNK, 83, 201)
FILES = (f"stream_{CHUNK}.onnx", "tail.onnx", "decode.onnx")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export_pair(tiny_source("qwen3"), tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(("family", "route"), PAIRS)
def test_tokens_of_the_cpu_operator_and_no_lint(family: str, route: str, tmp_path: Path) -> None:
    made = export_pair(tiny_source(family, route), tmp_path)
    ascend, cpu = (TriangleSession.from_folder(path) for path in (made.ascend, made.cpu))
    assert (ascend.kernel, cpu.kernel) == ("static", "native")
    for length in LENGTHS:
        ids = prompt(length)
        assert ascend.generate(ids, 6).ids == cpu.generate(ids, 6).ids, length
        assert np.abs(last_logits(ascend, ids) - last_logits(cpu, ids)).max() < 1e-3, length
    for file in FILES:
        found = lint_file(made.ascend / file, find_soc("Ascend310P3"), LengthAxes(SLOTS))
        assert [f for f in found if f.severity is not Severity.NOTE] == []
        model = onnx.load(made.ascend / file, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]


def test_the_tail_and_short_prompts_depend_on_the_pattern(pair: Pair) -> None:
    """The comparison above can fail: other dense rows give other logits."""
    session = TriangleSession.from_folder(pair.ascend)
    ids = prompt(150)
    wrong = dataclasses.replace(
        session.manifest, pattern=dataclasses.replace(session.manifest.pattern, num_last_tokens=8)
    )
    backend = session.backend
    assert isinstance(backend, StaticBackend)
    other = TriangleSession(dataclasses.replace(backend, manifest=wrong), None, frozenset())
    assert np.abs(last_logits(other, ids) - last_logits(session, ids)).max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 7, CHUNK, 50])
def test_steps_of_any_size_give_the_logits_of_one_pass(pair: Pair, chunk: int) -> None:
    session = TriangleSession.from_folder(pair.ascend)
    ids = prompt(101)
    np.testing.assert_allclose(
        last_logits(session, ids, chunk), last_logits(session, ids), atol=2e-5
    )


def test_a_second_turn_continues_the_cache(pair: Pair) -> None:
    answers = []
    for folder in (pair.ascend, pair.cpu):
        session = TriangleSession.from_folder(folder)
        cache = session.new_cache(SLOTS)
        first = session.generate(prompt(70), 5, cache=cache)
        second = session.generate(prompt(90, seed=1), 5, cache=cache)
        short = session.generate(prompt(3, seed=2), 5, cache=cache)
        answers.append((first.ids, second.ids, short.ids))
    assert answers[0] == answers[1]


def test_the_cache_can_be_filled_to_its_last_slot(pair: Pair) -> None:
    ascend, cpu = (TriangleSession.from_folder(path) for path in (pair.ascend, pair.cpu))
    ids = prompt(SLOTS - 4)
    assert ascend.generate(ids, 4).ids == cpu.generate(ids, 4).ids
    with pytest.raises(PromptError, match=f"but the context has {SLOTS}"):
        ascend.generate(ids, 5)


def test_prompts_of_a_batch_run_one_by_one(pair: Pair) -> None:
    session = TriangleSession.from_folder(pair.ascend)
    rows = [prompt(40), prompt(40, seed=1)]
    assert [r.ids for r in session.generate(rows, 4)] == [
        session.generate(ids, 4).ids for ids in rows
    ]


@pytest.mark.parametrize("factor", [1.0, 12.0])
def test_float16(tmp_path: Path, factor: float) -> None:
    """With the larger factor queries and keys give scores in the thousands."""
    source = save_half(tiny_source(), tmp_path / "half" / "model.onnx", factor)
    made = export_pair(source, tmp_path)
    assert Manifest.load(made.ascend).cache_dtype == "float16"
    ascend, cpu = (TriangleSession.from_folder(path) for path in (made.ascend, made.cpu))
    for length in (9, 41, 150):
        ids = prompt(length)
        want = last_logits(cpu, ids)
        got = last_logits(ascend, ids)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() < 3e-2 * np.abs(want).max()


def test_manifest_describes_the_files(pair: Pair) -> None:
    manifest = Manifest.load(pair.ascend)
    static = manifest.static
    assert static is not None
    assert (static.slots, static.soc, manifest.context_length) == (SLOTS, "Ascend910B3", SLOTS)
    for graph in (static.stream, static.tail, static.decode):
        content = (pair.ascend / graph.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == graph.sha256
        model = onnx.load_model_from_string(content)
        for tensors, values in ((graph.inputs, model.graph.input),
                                (graph.outputs, model.graph.output)):  # fmt: skip
            assert [tensor.name for tensor in tensors] == [value.name for value in values]
            assert [list(tensor.shape) for tensor in tensors] == [
                [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
            ]
    assert not any(tensor.name == manifest.logits for tensor in static.stream.outputs)


def test_manifest_names_only_inputs_that_exist(pair: Pair) -> None:
    manifest = Manifest.load(pair.ascend)
    static = manifest.static
    assert static is not None
    caches = [(layer.past_key, layer.past_value) for layer in manifest.cache]
    inputs = {manifest.input_ids, static.start, static.length, *sum(caches, ())}
    inputs |= {manifest.attention_mask, manifest.position_ids, manifest.prompt_length} - {None}
    news = [(layer.present_key, layer.present_value) for layer in manifest.cache]
    outputs = {manifest.logits, *sum(news, ())}
    graphs = (static.stream, static.tail, static.decode)
    assert inputs == {tensor.name for graph in graphs for tensor in graph.inputs}
    assert outputs == {tensor.name for graph in graphs for tensor in graph.outputs}
    assert (pair.ascend / manifest.model_file).is_file()
    assert (manifest.inputs, manifest.outputs) == ((), ())  # each graph lists its own


def test_weights_are_shared_and_begin_at_offset_0(tmp_path: Path) -> None:
    source = load_whole(tiny_source())
    wide = next(t for t in source.graph.initializer if t.name.endswith("embed_tokens.weight"))
    array = onnx.numpy_helper.to_array(wide)
    wide.CopyFrom(onnx.numpy_helper.from_array(np.tile(array, (8, 1)), wide.name))
    (tmp_path / "source").mkdir()
    onnx.save(source, tmp_path / "source" / "model.onnx")
    export_ascend(tmp_path / "source" / "model.onnx", tmp_path / "out")
    located = {}
    for file in FILES:
        model = onnx.load(tmp_path / "out" / file, load_external_data=False)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                assert int(entries.get("offset", "0")) == 0
                located.setdefault(entries["location"], set()).add(file)
    assert located == {"weights/00000.bin": set(FILES)}


def test_build_script(pair: Pair, tmp_path: Path) -> None:
    """Syntax by sh, behaviour with an atc that succeeds, and with ones that do not."""
    script = (pair.ascend / "build_om.sh").read_text()
    (tmp_path / "build_om.sh").write_text(script)
    assert "--precision_mode_v2=origin" in script
    assert "--input_shape" in script
    assert f"input_ids:1,{LAST};start:1;length:1;cache.0.key:1,2,{SLOTS},16" in script

    def run(atc: str | None) -> subprocess.CompletedProcess[str]:
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        if atc is not None:
            (tools / "atc").write_text(f"#!/bin/sh\n{atc}\n")
            (tools / "atc").chmod(0o755)
        environment = {"PATH": f"{tools}:/usr/bin:/bin"}
        return subprocess.run(
            ["sh", str(tmp_path / "build_om.sh"), "Ascend910B1"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    missing = run(None)
    assert missing.returncode == 1
    assert "atc is not on the PATH" in missing.stderr
    writes = (
        'for a in "$@"; do case "$a" in --output=*) echo om > "${a#--output=}.om";; esac; done\n'
        'echo "$@" >> calls\n'
    )
    done = run(writes + "echo ATC run success")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 * len(FILES)
    assert all("--soc_version=Ascend910B1" in call for call in calls)
    assert ["--mode=3" in call for call in calls] == [True, False] * len(FILES)
    silent = run(writes + "true")
    assert silent.returncode == 1
    assert "atc failed (exit code 0)" in silent.stderr
    failing = run("echo ATC run failed; exit 3")
    assert failing.returncode == 1
    assert "atc failed (exit code 3)" in failing.stderr


def test_the_report_says_what_runs_and_what_it_should_cost(pair: Pair) -> None:
    content = json.loads((pair.ascend / "export_report.json").read_text())
    assert [layer["runs_as"] for layer in content["layers"]] == [
        "row blocks", "block form", "block form",
    ]  # fmt: skip
    assert content["prediction"]["soc"] == "Ascend910B3"
    assert any("never converted by atc" in note for note in content["notes"])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (AscendRequest(soc="Ascend1"), "soc is Ascend1, but must be one of"),
        (AscendRequest(max_length=100_000), "--max-length is 100000, but the model's context"),
        (AscendRequest(max_length=8), "--max-length is 8, but sinks and last rows alone are 20"),
        (AscendRequest(chunk=32, max_length=128, block=7), "does not divide the chunk of 32"),
    ],
)
def test_impossible_requests(tmp_path: Path, request_: AscendRequest, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        export_ascend(tiny_source(), tmp_path / "out", request_)
    assert not (tmp_path / "out").exists()


def test_an_operator_without_a_spelling_is_refused_by_name(tmp_path: Path) -> None:
    model = load_whole(tiny_source())
    logits = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == logits else name for name in node.output]
    model.graph.node.append(
        onnx.helper.make_node(
            "BiasGelu", ["before", "bias"], [logits], name="odd_one", domain="com.microsoft"
        )
    )
    size = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(size, np.float32), "bias"))
    (tmp_path / "source").mkdir()
    onnx.save(model, tmp_path / "source" / "model.onnx")
    with pytest.raises(RefusedError, match=r"node odd_one is com\.microsoft::BiasGelu"):
        export_ascend(tmp_path / "source" / "model.onnx", tmp_path / "out")


def test_layers_that_slide_a_window_of_their_own(tmp_path: Path) -> None:
    """Gemma 2, from a folder: windows and softcaps, in the stream, the tail and decoding."""
    made = export_pair(tiny_folder("gemma2"), tmp_path, LayerRequest(layers=(1,)))
    assert [layer.action for layer in made.report.layers] == ["windowed", "triangle", "windowed"]
    ascend, cpu = (TriangleSession.from_folder(path) for path in (made.ascend, made.cpu))
    for length in LENGTHS:
        ids = prompt(length)
        assert ascend.generate(ids, 6).ids == cpu.generate(ids, 6).ids, length
        assert np.abs(last_logits(ascend, ids) - last_logits(cpu, ids)).max() < 1e-3, length


def test_nothing_of_the_guards_against_masks_is_left(pair: Pair) -> None:
    for file in FILES:
        model = onnx.load(pair.ascend / file, load_external_data=False)
        names = [name for node in model.graph.node for name in (*node.input, *node.output)]
        assert not any("nan" in name.lower() for name in names)
        for tensor in model.graph.initializer:
            if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
                assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all()


def test_the_dense_twin(tmp_path: Path) -> None:
    """Also: rows packed by heads may be as many as the cache has slots."""
    for target in ("ascend", "cpu"):
        request = AscendRequest(chunk=CHUNK, max_length=SLOTS)
        options = ExportOptions(
            tiny_source(), tmp_path / target, target=target, dense=True, settings=request
        )
        assert {layer.action for layer in export(options, Silent()).layers} == {"dense"}
    ascend, cpu = (TriangleSession.from_folder(tmp_path / name) for name in ("ascend", "cpu"))
    for length in (1, 128, 200):
        ids = prompt(length)
        assert np.abs(last_logits(ascend, ids) - last_logits(cpu, ids)).max() < 1e-3, length
