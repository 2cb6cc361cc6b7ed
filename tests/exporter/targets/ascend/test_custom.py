"""The lowering that keeps the operator: the graphs' numbers, what they say, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.library import LibraryNotFoundError
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import LayerRequest
from trianglemix.exporter.sources.huggingface.run_worker import (
    HuggingFaceOptions,
    export_huggingface,
)
from trianglemix.exporter.targets.ascend.custom_operator import check_custom
from trianglemix.exporter.targets.ascend.lint import lint_file
from trianglemix.exporter.targets.ascend.lint_model import LengthAxes, Severity
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.exporter.targets.ascend.soc import find_soc
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.backends import ort_static
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import (
    CHUNK,
    LAST,
    SLOTS,
    TRIANGLE,
    export_ascend,
    last_logits,
    prompt,
    tiny_source,
)
from tests.exporter.targets.ascend.half_model import save_half
from tests.tiny_models import tiny_folder

WINDOWED = LayerRequest(layers=(1,))
LENGTHS = (1, LAST - 1, LAST + 1, LAST + CHUNK, 83, 201, SLOTS - 6)
FILES = (f"stream_{CHUNK}.onnx", "tail.onnx", "decode.onnx")


def both(source: Path, folder: Path, layers: LayerRequest = TRIANGLE) -> list[TriangleSession]:
    """Custom and block form of a float16 source."""
    block = AscendRequest(chunk=CHUNK, max_length=SLOTS)
    export_ascend(source, folder / "block", block, layers)
    export_ascend(source, folder / "custom", replace(block, lowering="custom"), layers)
    return [TriangleSession.from_folder(folder / name) for name in ("custom", "block")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("custom")
    both(half("qwen3", place), place)
    return place / "custom"


def half(family: str, place: Path) -> Path:
    return save_half(tiny_source(family), place / "half" / "model.onnx")


@pytest.mark.parametrize(
    ("family", "layers"),
    [("qwen3", TRIANGLE), ("llama", LayerRequest(start_layer=0)), ("gemma2", WINDOWED)],
)
def test_tokens_of_the_block_form(family: str, layers: LayerRequest, tmp_path: Path) -> None:
    """GQA, every layer triangle, and layers that slide a window of their own with softcaps."""
    if layers is WINDOWED:
        options = HuggingFaceOptions(dtype="float16")
        source = export_huggingface(tiny_folder(family), tmp_path / "half", options)
    else:
        source = half(family, tmp_path)
    custom, block = both(source, tmp_path, layers)
    assert (custom.kernel, block.kernel) == ("native", "static")
    assert custom.manifest.cache_dtype == "float16"
    for length in LENGTHS:
        ids = prompt(length)
        got, want = last_logits(custom, ids), last_logits(block, ids)
        assert np.abs(got - want).max() < 1e-2 * np.abs(want).max(), length
        assert custom.generate(ids, 6).ids == block.generate(ids, 6).ids, length


def test_the_stream_graph_drops_what_the_pattern_drops(folder: Path) -> None:
    """The comparison above can fail: a stream whose rows are all last ones gives other logits."""
    ids, session = prompt(150), TriangleSession.from_folder(folder)
    before = last_logits(session, ids)
    file = folder / FILES[0]
    model = onnx.load(file)
    changed = 0
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.int32 and array.tolist() == [np.iinfo(np.int32).max]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(array), tensor.name))
            changed += 1
    assert changed == 1
    content = file.read_bytes()
    try:
        onnx.save(model, file)
        dense = last_logits(TriangleSession.from_folder(folder), ids)
    finally:
        file.write_bytes(content)
    assert np.abs(dense - before).max() > 1e-3


def test_files_hold_the_operator_and_nothing_else_of_its_domain(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.static is not None
    assert manifest.static.lowering == "custom"
    assert "never compiled by CANN" in (manifest.static.custom_operator or "")
    assert manifest.static.slots == manifest.context_length == SLOTS
    for file in FILES:
        model = onnx.load(folder / file, load_external_data=False)
        assert {(e.domain, e.version) for e in model.opset_import} == {("", 18), ("trianglemix", 1)}
        assert not model.functions
        assert {n.op_type for n in model.graph.node if n.domain} == {"TriangleAttention"}
        assert not any(node.op_type == "Softmax" for node in model.graph.node)
        for node in model.graph.node:
            if node.domain:
                assert len(node.input) == 9
                assert all(node.input)
                kinds = {a.name: onnx.AttributeProto.AttributeType.Name(a.type)
                         for a in node.attribute}  # fmt: skip
                assert {name for name in kinds if kinds[name] == "FLOAT"} == {"scale", "softcap"}
                assert {name for name in kinds if kinds[name] == "INT"} == {
                    "num_heads", "kv_num_heads", "num_sink_tokens", "sliding_window_size",
                    "num_last_tokens",
                }  # fmt: skip
        for soc, errors in (("Ascend910B3", set()), ("Ascend310P3", {"custom-chip"})):
            found = lint_file(folder / file, find_soc(soc), LengthAxes(SLOTS))
            assert {f.rule for f in found if f.severity is Severity.ERROR} == errors
    report = (folder / "export_report.json").read_text()
    assert "never compiled by CANN" in report
    assert '"runs_as": "custom operator"' in report


def test_build_script_asks_for_the_operator_package(folder: Path, tmp_path: Path) -> None:
    script = (folder / "build_om.sh").read_text()
    assert "never compiled by CANN" in script
    (tmp_path / "build_om.sh").write_text(script)
    tools = tmp_path / "tools"
    tools.mkdir()
    atc = 'for a in "$@"; do case "$a" in --output=*) echo om > "${a#--output=}.om";; esac; done\n'
    (tools / "atc").write_text(f"#!/bin/sh\n{atc}echo ATC run success\n")
    (tools / "atc").chmod(0o755)

    def run(**places: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(tmp_path / "build_om.sh")],
            env={"PATH": f"{tools}:/usr/bin:/bin", **places},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    plugins = tmp_path / "vendors" / "some" / "framework" / "onnx"
    plugins.mkdir(parents=True)
    without = run(ASCEND_OPP_PATH=str(tmp_path))
    assert without.returncode == 1
    assert "build and install custom_ops/ascend" in without.stderr
    (plugins / "libcust_onnx_parsers.so").write_bytes(b"")
    for places in (
        {"ASCEND_OPP_PATH": str(tmp_path)},
        {"ASCEND_CUSTOM_OPP_PATH": f"/nowhere:{tmp_path / 'vendors' / 'some'}"},
    ):
        done = run(**places)
        assert done.returncode == 0, done.stderr
        assert "libcust_onnx_parsers.so" in done.stdout


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend950PR_9599"])
def test_chips_that_the_package_is_not_written_for(soc: str, tmp_path: Path) -> None:
    request = AscendRequest(soc, CHUNK, SLOTS, lowering="custom")
    with pytest.raises(ExportError, match=rf"for Ascend910B\*.*not for {soc}; use --lowering bl"):
        export_ascend(tiny_source(), tmp_path / "out", request)


def test_float32_is_not_written_for(tmp_path: Path) -> None:
    request = AscendRequest(chunk=CHUNK, max_length=SLOTS, lowering="custom")
    with pytest.raises(ExportError, match="attention is in float32; export a float16 model"):
        export_ascend(tiny_source(), tmp_path / "out", request)


def test_head_sizes_that_the_package_does_not_take() -> None:
    shape = AttentionShape(4, 2, 24, 16)
    with pytest.raises(ExportError, match="multiples of 16, but this model's is 24"):
        check_custom(find_soc("Ascend910B3"), [(ir.DataType.FLOAT16, shape)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lowering", "custom"], "--lowering belongs to --target ascend"),
        (
            ["--target", "ascend", "--lowering", "custom", "--block", "64"],
            "--block is about the block form",
        ),
        (
            ["--target", "ascend", "--lowering", "custom", "--cost"],
            "--cost is about the block form",
        ),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trianglemix.exporter.cli", str(tiny_source())]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), *options],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_native_library_it_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise LibraryNotFoundError("libtrianglemix_ops.so is not in this installation")

    monkeypatch.setattr(ort_static, "library_path", missing)
    with pytest.raises(LibraryNotFoundError, match="is not in this installation"):
        TriangleSession.from_folder(folder, provider="cpu")
