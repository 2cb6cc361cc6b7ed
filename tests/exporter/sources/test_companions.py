"""What belongs to a model is found where hubs put it, and nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.sources import companions as module
from trianglemix.exporter.sources.companions import Companions
from trianglemix.exporter.sources.find_source import find_source

CONFIG: dict[str, Any] = {"model_type": "llama"}


def _write(folder: Path, **files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_DOT_", ".")).write_text(
            content if isinstance(content, str) else json.dumps(content)
        )


def _model(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def _copied(companions: Companions, out: Path) -> dict[str, str]:
    out.mkdir()
    companions.copy(out)
    return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["onnx", "ONNX", "gpu-onnx", "onnx_int4"])
def test_a_folder_named_for_onnx_has_its_files_one_up(name: str, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    _write(hub, config_DOT_json=CONFIG, tokenizer_DOT_json="{}", tokenizer_config_DOT_json="{}")
    _write(hub / name, config_DOT_json={"own": 1})
    _write(hub / "additional_chat_templates", tool_use_DOT_jinja="x")
    found = find_source(_model(hub / name / "model_q4f16.onnx")).companions
    assert found.above == hub
    copied = _copied(found, tmp_path / "out")
    assert sorted(copied) == [
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(copied["config.json"]) == {"own": 1}  # the nearer one


def test_the_note_says_where_from(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    _write(hub, config_DOT_json=CONFIG, tokenizer_DOT_json="{}")
    _write(hub / "onnx", generation_config_DOT_json="{}")
    out = tmp_path / "out"
    out.mkdir()
    notes = find_source(_model(hub / "onnx" / "model.onnx")).companions.copy(out)
    assert notes == [
        "copied along: generation_config.json",
        f"copied along from {hub}, one folder up: config.json, tokenizer.json",
    ]


def test_a_chat_template_is_not_spoilt_by_another(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    _write(hub, config_DOT_json=CONFIG, chat_template_DOT_jinja="theirs")
    _write(hub / "onnx", tokenizer_config_DOT_json={"chat_template": "own"})
    model = _model(hub / "onnx" / "model.onnx")
    assert sorted(_copied(find_source(model).companions, tmp_path / "a")) == [
        "config.json",
        "tokenizer_config.json",
    ]
    _write(hub / "onnx", tokenizer_config_DOT_json={})
    copied = _copied(find_source(model).companions, tmp_path / "b")
    assert copied["chat_template.jinja"] == "theirs"


def test_relative_names_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1a", tmp_path / "hub" / "blobs"
    _write(blobs, a=CONFIG, b="")
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot / "config.json").symlink_to(blobs / "a")
    (snapshot / "onnx" / "model.onnx").symlink_to(blobs / "b")
    for folder, name in ((snapshot, "onnx/model.onnx"), (snapshot / "onnx", "model.onnx")):
        monkeypatch.chdir(folder)
        assert find_source(Path(name)).companions.above == snapshot


def test_what_lies_above_must_be_a_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tmp_path / "plain" / "model.onnx")
    assert find_source(model).companions.above is None  # nothing there
    _write(tmp_path, config_DOT_json={"editor": "vi"}, tokenizer_DOT_json="{}")
    assert find_source(model).companions.above is None  # another program's
    _write(tmp_path, config_DOT_json=CONFIG)
    assert find_source(model).companions.above == tmp_path
    _write(model.parent, config_DOT_json="{}")
    assert find_source(model).companions.above is None  # it has its own
    inside = _model(tmp_path / "onnx" / "model.onnx")
    assert find_source(inside).companions.above == tmp_path
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")  # a home's parent, and a home
    assert find_source(inside).companions.above is None
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert find_source(inside).companions.above is None
    monkeypatch.undo()
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    assert find_source(inside).companions.above is None


def test_the_decoder_that_genai_names(tmp_path: Path) -> None:
    for name in ("embedding", "text", "vision"):
        _model(tmp_path / f"{name}.onnx")
    config = tmp_path / "genai_config.json"
    config.write_text('{"model": {"decoder": {"filename": "text.onnx"}}}')
    assert find_source(tmp_path).path == tmp_path / "text.onnx"
    for other in ("[]", '{"model": {"decoder": {"filename": "none.onnx"}}}', '{"model": "x"}'):
        config.write_text(other)
        with pytest.raises(ExportError, match="several ONNX models"):
            find_source(tmp_path)


def test_a_folder_with_several_models(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    _write(hub, config_DOT_json=CONFIG)
    for name in ("model_q4", "model", "model_fp16"):
        _model(hub / "onnx" / f"{name}.onnx")
    found = find_source(hub)
    assert found.path == hub / "onnx" / "model.onnx"
    assert found.companions.folders == (hub / "onnx", hub)
    assert found.notes == (
        "the folder's onnx/model.onnx was taken, not onnx/model_fp16.onnx, onnx/model_q4.onnx: "
        "name another to have it",
    )
    found.path.unlink()
    with pytest.raises(ExportError, match=r"several ONNX models \(onnx/model_fp16.*name one of"):
        find_source(hub)


def test_models_deeper_down(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    _write(hub, config_DOT_json=CONFIG, tokenizer_DOT_json="{}")
    deep = hub / "cpu_and_mobile" / "cpu-int4-block-32"
    _write(deep, genai_config_DOT_json="{}")
    model = _model(deep / "model.onnx")
    found = find_source(hub)
    assert (found.path, found.companions.folders) == (model, (deep, hub))
    _model(hub / "cuda" / "cuda-fp16" / "model.onnx")
    with pytest.raises(ExportError, match=r"cpu-int4-block-32/model\.onnx, cuda/cuda-fp16"):
        find_source(hub)
    _write(hub, model_DOT_safetensors="")
    assert find_source(hub).is_huggingface  # its weights come first
