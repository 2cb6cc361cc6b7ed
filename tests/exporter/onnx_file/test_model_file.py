"""Weights are linked or copied, never loaded; sources stay what they were; bad data is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.onnx_file import file_copy
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.sources.find_source import find_source
from trianglemix.exporter.verify.graph_facts import graph_facts

from tests.end_to_end.odd_interfaces import Interface
from tests.exporter.exports import Session, assert_close, export_to, random_ids
from tests.tiny_models import tiny_model

DATA = "weights/model.bin"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose weights lie in a file in a folder of their own."""
    folder = tmp_path / "source"
    (folder / "weights").mkdir(parents=True)
    ir.save(PATTERN.example().model, folder / "model.onnx", external_data=DATA)
    assert (folder / DATA).stat().st_size > 1000
    (folder / "config.json").write_text('{"max_position_embeddings": 321}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "private.txt").write_text("not to be copied")
    return folder / "model.onnx"


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_an_export_has_files_of_its_own_and_both_models_stay_readable(
    source: Path, tmp_path: Path
) -> None:
    report = export_to(source, tmp_path / "out", layers=(1,))
    for folder in (source.parent, tmp_path / "out"):
        assert (folder / DATA).stat().st_nlink == 1
        onnx.load(folder / "model.onnx")  # refuses files with several hard links
        onnx.checker.check_model(str(folder / "model.onnx"))
        for value in ir.load(folder / "model.onnx").graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()  # refuses them, too
    assert (tmp_path / "out" / DATA).read_bytes() == (source.parent / DATA).read_bytes()
    assert any(re.match("weights (copied|cloned)", note) for note in report.notes)


def test_links_share_the_file_and_say_what_that_costs(source: Path, tmp_path: Path) -> None:
    report = export_to(source, tmp_path / "linked", layers=(1,), weights="link")
    export_to(source, tmp_path / "copied", layers=(1,))
    original, linked = ((folder / DATA).stat() for folder in (source.parent, tmp_path / "linked"))
    assert linked.st_ino == original.st_ino
    assert any("onnx and onnx_ir refuse" in note for note in report.notes)
    with pytest.raises(onnx.checker.ValidationError, match="hard links"):
        onnx.load(source)  # else the note, and the default, are out of date
    ids = random_ids(1, 30)
    assert_close(
        Session.of(tmp_path / "linked").logits(ids), Session.of(tmp_path / "copied").logits(ids), 0
    )


def test_another_file_system_gets_copies_and_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(file_copy.os, "link", refuse)
    report = export_to(source, tmp_path / "out", layers=(1,), weights="link")
    assert any("another file system" in note for note in report.notes)
    assert (tmp_path / "out" / DATA).read_bytes() == (source.parent / DATA).read_bytes()


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_kernel_that_cannot_copy_is_helped_out(
    chunks: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems refuse from the start, some in the middle."""
    whole, left = os.copy_file_range, [chunks]

    def copy(reader: int, writer: int, _: int) -> int:
        if not left[0]:
            raise OSError(18, "Invalid cross-device link")
        left[0] -= 1
        return whole(reader, writer, 1000)

    monkeypatch.setattr(file_copy.os, "copy_file_range", copy)
    export_to(source, tmp_path / "out", layers=(1,))
    assert (tmp_path / "out" / DATA).read_bytes() == (source.parent / DATA).read_bytes()


def test_a_clone_is_taken_where_there_are_any(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(writer: int, request: int, reader: int) -> None:
        assert request == 0x40049409
        os.sendfile(writer, reader, 0, os.fstat(reader).st_size)

    monkeypatch.setattr(file_copy.fcntl, "ioctl", clone)
    report = export_to(source, tmp_path / "out", layers=(1,))
    assert any("weights cloned" in note for note in report.notes)
    assert (tmp_path / "out" / DATA).read_bytes() == (source.parent / DATA).read_bytes()


def test_no_room_for_a_copy_is_said_before_the_disk_is_full(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        file_copy.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=1000)
    )
    monkeypatch.setattr(file_copy, "_clone", lambda reader, writer: False)
    with pytest.raises(ExportError, match=r"0\.0 GiB free.*--weights link"):
        export_to(source, tmp_path / "out", layers=(1,))
    assert not (tmp_path / "out").exists()
    export_to(source, tmp_path / "out", layers=(1,), weights="link")


def test_a_source_with_linked_data_is_read_all_the_same(tmp_path: Path) -> None:
    """Every constant outside the proto, in a file that has two names."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "model.onnx"
    onnx.save(
        ir.to_proto(PATTERN.example().model), str(path),
        save_as_external_data=True, location="weights.bin", size_threshold=0,
    )  # fmt: skip
    os.link(path.with_name("weights.bin"), tmp_path / "other.bin")
    report = export_to(path, tmp_path / "out", layers=(1,))
    assert len(report.layers) == 3
    assert graph_facts(path, tmp_path / "out" / "model.onnx").ids  # --verify reads it as well


def test_rotary_tables_in_a_hugging_face_cache_are_read(tmp_path: Path) -> None:
    path = Interface({}).write(tmp_path / "plain" / "model.onnx")
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    onnx.save(
        onnx.load(path), str(tmp_path / "blobs.onnx"),
        save_as_external_data=True, location="blobs.data", size_threshold=1000,
    )  # fmt: skip
    (snapshot / "model.onnx").symlink_to("../blobs.onnx")
    (snapshot / "blobs.data").symlink_to("../blobs.data")
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = {"model_type": "qwen2", "rope_scaling": scaled, "hidden_size": 64, "head_dim": 16}
    (snapshot / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    report = export_to(snapshot, tmp_path / "out", layers=(1,), verify=True)
    assert all(check.passed for check in report.verification)


def test_a_hugging_face_cache_is_a_source(source: Path, tmp_path: Path) -> None:
    """There the files of a snapshot are links to blobs with other names."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "weights").mkdir(parents=True)
    (snapshot / "model.onnx").symlink_to("../../blobs/1111")
    (snapshot / DATA).symlink_to("../../../blobs/2222")
    shutil.copy(source, blobs / "1111")
    shutil.copy(source.parent / DATA, blobs / "2222")
    ids = random_ids(1, 30)
    export_to(source, tmp_path / "plain", layers=(1,))
    expected = Session.of(tmp_path / "plain").logits(ids)
    for weights in ("copy", "link"):
        export_to(snapshot, tmp_path / weights, layers=(1,), weights=weights)
        assert not (tmp_path / weights / DATA).is_symlink()
        assert_close(Session.of(tmp_path / weights).logits(ids), expected, 0)


def test_the_source_is_never_changed(source: Path, tmp_path: Path) -> None:
    before = _hashes(source.parent)
    stamps = {path: path.stat().st_mtime_ns for path in source.parent.rglob("*") if path.is_file()}
    export_to(source, tmp_path / "out", layers=(1,))
    export_to(source, tmp_path / "out", layers=(2,), force=True, weights="link")
    assert _hashes(source.parent) == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_an_export_survives_its_source_and_its_successor(source: Path, tmp_path: Path) -> None:
    export_to(source, tmp_path / "first", layers=(1,), weights="link")
    ids = random_ids(1, 30)
    expected = Session.of(tmp_path / "first").logits(ids)
    export_to(tmp_path / "first", tmp_path / "second", layers=(1,), weights="link")
    for path in (source, source.parent / DATA):
        path.unlink()
    assert_close(Session.of(tmp_path / "second").logits(ids), expected)


def test_companions_are_copied_and_nothing_else(source: Path, tmp_path: Path) -> None:
    export_to(source, tmp_path / "out", layers=(1,))
    assert sorted(_hashes(tmp_path / "out")) == [
        "config.json",
        "export_report.json",
        "manifest.json",
        "model.onnx",
        "tokenizer.json",
        DATA,
    ]


def _remove(folder: Path) -> None:
    (folder / DATA).unlink()


def _cut_short(folder: Path) -> None:
    os.truncate(folder / DATA, 1000)


def _link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    (folder / DATA).rename(outside)
    (folder / DATA).symlink_to(outside)


def _point_to(location: str, folder: Path) -> None:
    model = ir.load(folder / "model.onnx")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype,
                shape=tensor.shape, name=tensor.name,
            )  # fmt: skip
    ir.save(model, folder / "model.onnx")


def _point_above(folder: Path) -> None:
    _point_to("../weights.bin", folder)


def _point_to_root(folder: Path) -> None:
    _point_to("/etc/hostname", folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove, "is missing"),
        (_cut_short, "cut off"),
        (_link_outside, "leads outside"),
        (_point_above, "outside the model's folder"),
        (_point_to_root, "outside the model's folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_external_data_is_refused(
    spoil: object, message: str, source: Path, tmp_path: Path
) -> None:
    assert callable(spoil)
    spoil(source.parent)
    with pytest.raises(ExportError, match=message):
        export_to(source, tmp_path / "out", layers=(1,))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_sources_are_found(tmp_path: Path) -> None:
    (tmp_path / "one.onnx").write_bytes(b"")
    assert find_source(tmp_path).path.name == "one.onnx"
    (tmp_path / "two.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match=r"several ONNX models \(one\.onnx, two\.onnx\)"):
        find_source(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    assert find_source(tmp_path).path.name == "model.onnx"
    hub = tmp_path / "hub"
    (hub / "onnx").mkdir(parents=True)
    (hub / "config.json").write_text("{}")
    assert find_source(hub).is_huggingface
    (hub / "onnx" / "model.onnx").write_bytes(b"")
    found = find_source(hub)
    assert found.path == hub / "onnx" / "model.onnx"
    assert found.companions.folders == (hub / "onnx", hub)


_EXPORT = (
    "import sys\n"
    "from pathlib import Path\n"
    "from tests.exporter.exports import export_to\n"
    "export_to(Path(sys.argv[1]), Path(sys.argv[2]), layers=(1,), last_token_logits=True,"
    " weights='link')\n"
    "status = Path('/proc/self/status').read_text().split()\n"
    "print(status[status.index('VmHWM:') + 1])\n"  # ru_maxrss would count the parent's, too
)


def _peak_kib(source: Path, output: Path) -> int:
    command = [sys.executable, "-c", _EXPORT, str(source), str(output)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_stays_flat_as_the_model_grows(tmp_path: Path) -> None:
    """A gigabyte of (sparse) weights more: the export needs no more memory for it."""
    peaks = []
    for name, rows in (("small", 61), ("large", (1 << 30) // 160)):
        model = PATTERN.example().model
        folder = tmp_path / name
        folder.mkdir()
        for part, shape in (("embedding", (rows, 40)), ("head", (40, rows))):
            weight = model.graph.initializers[f"trianglemix/weight.{part}"]
            size = 4 * int(np.prod(shape))
            os.truncate(os.open(folder / f"{part}.data", os.O_CREAT | os.O_RDWR), size)
            weight.const_value = ir.ExternalTensor(
                f"{part}.data", 0, size, ir.DataType.FLOAT,
                shape=ir.Shape(shape), name=weight.name or "", base_dir=folder,
            )  # fmt: skip
            weight.shape = ir.Shape(shape)
        ir.save(model, folder / "model.onnx")
        peaks.append(_peak_kib(folder / "model.onnx", tmp_path / f"out-{name}"))
    assert peaks[1] < 400 << 10
    assert peaks[1] < peaks[0] + (40 << 10), peaks


def test_a_real_route_links_its_data(tmp_path: Path) -> None:
    model = tiny_model("llama", "dynamo-sdpa-20")
    export_to(model.path, tmp_path / "out", layers=(1,))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "manifest.json", "config.json", "tokenizer.json"} <= names
