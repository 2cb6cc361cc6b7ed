"""genai's configuration is carried over with what its author put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trianglemix.custom_ops.library import LIBRARY_NAME
from trianglemix.exporter.folder.genai_config import write_genai_config, write_stop_tokens
from trianglemix.exporter.sources.companions import Companions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def _write(source: Path, model: dict[str, Any] | None = None, **decoder: Any) -> Companions:
    content = {"model": {"decoder": {"filename": "old.onnx", **decoder}, **(model or {})}}
    (source / "genai_config.json").write_text(json.dumps(content))
    return Companions((source,))


def _carried(companions: Companions, out: Path) -> tuple[dict[str, Any], str]:
    out.mkdir(exist_ok=True)
    notes = write_genai_config(companions, out, "model.onnx", needs_library=True)
    return json.loads((out / "genai_config.json").read_text())["model"], "\n".join(notes)


def test_our_library_is_named(source: Path, tmp_path: Path) -> None:
    model, _ = _carried(_write(source), tmp_path / "out")
    assert model["decoder"] == {
        "filename": "model.onnx",
        "session_options": {"custom_ops_library": LIBRARY_NAME},
    }
    assert (tmp_path / "out" / LIBRARY_NAME).is_file()


@pytest.mark.parametrize("name", ["libmine.so", "libs/libmine.so"])
def test_the_authors_library_stays_and_is_copied(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b"code")
    options = {"custom_ops_library": name, "log_id": "x"}
    model, notes = _carried(_write(source, session_options=options), tmp_path / "out")
    assert model["decoder"]["session_options"] == options
    assert (tmp_path / "out" / name).read_bytes() == b"code"
    assert f"names the operator library {name}, which stays" in notes
    assert (tmp_path / "out" / LIBRARY_NAME).is_file()  # so that it can be named instead


@pytest.mark.parametrize("name", ["missing.so", "../libmine.so", "/opt/libmine.so"])
def test_a_library_that_cannot_be_copied_is_told(name: str, source: Path, tmp_path: Path) -> None:
    (source.parent / "libmine.so").write_bytes(b"code")
    model, notes = _carried(
        _write(source, session_options={"custom_ops_library": name}), tmp_path / "out"
    )
    assert model["decoder"]["session_options"]["custom_ops_library"] == name
    assert f"names the operator library {name}, which is not copied" in notes


def test_an_export_of_ours_names_its_own_library(source: Path, tmp_path: Path) -> None:
    options = {"custom_ops_library": LIBRARY_NAME}
    model, notes = _carried(_write(source, session_options=options), tmp_path / "out")
    assert model["decoder"]["session_options"] == options
    assert "stays" not in notes


def test_genai_is_not_told_to_cut_caches(source: Path, tmp_path: Path) -> None:
    companions = _write(source, sliding_window={"window_size": 24, "layers": [0]})
    model, notes = _carried(companions, tmp_path / "out")
    assert "sliding_window" not in model["decoder"]
    assert "decoder.sliding_window was left out" in notes


def test_stop_tokens_of_genai_alone(source: Path, tmp_path: Path) -> None:
    companions = _write(source, {"eos_token_id": [1, 2], "bos_token_id": 0})
    assert write_stop_tokens(companions, tmp_path)
    written = tmp_path / "generation_config.json"
    assert json.loads(written.read_text()) == {"bos_token_id": 0, "eos_token_id": [1, 2]}
    written.unlink()
    (source / "config.json").write_text('{"eos_token_id": 3}')
    assert write_stop_tokens(companions, tmp_path) == []  # it comes along, and says so itself
    assert not written.exists()
