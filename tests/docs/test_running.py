"""The programs of docs/running.md compile and run as they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.patterns.softmax import PATTERN

from tests.exporter.exports import Session, export_to, save_example

ROOT = Path(__file__).resolve().parents[2]
HEADERS = (ROOT / "build/onnxruntime-headers", Path("/usr/include"))
"""Folders that may hold `onnxruntime/onnxruntime_cxx_api.h`."""


def _program(language: str) -> str:
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    (program,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(program)


def _headers() -> Path:
    for folder in HEADERS:
        if (folder / "onnxruntime/onnxruntime_cxx_api.h").is_file():
            return folder / "onnxruntime"
    pytest.skip("no headers of ONNX Runtime: the C++ program is not compiled; make cpp-example")


@pytest.fixture(scope="module")
def next_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, linked to the library that onnxruntime's wheel carries."""
    headers, compiler = _headers(), shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: the C++ program is not compiled")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "next_token.cpp").write_text(_program("cpp"), encoding="utf-8")
    capi = Path(onnxruntime.__file__).parent / "capi"
    (library,) = capi.glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    command = [
        compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", str(headers),
        "next_token.cpp", "-L.", "-lonnxruntime", f"-Wl,-rpath,{folder}", "-o", "next_token",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "next_token"


def test_the_cpp_program_runs_an_export(next_token: Path, tmp_path: Path) -> None:
    source = save_example(PATTERN.example().model, tmp_path / "source")
    export_to(source, tmp_path / "out", layers=(1,))
    command = [str(next_token), str(library_path()), str(tmp_path / "out/model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = Session.of(tmp_path / "out").logits(np.array([[1, 2, 3]]))
    assert int(done.stdout) == int(logits[0, -1].argmax())


def test_the_warning_of_prompt_length_is_the_only_one_and_can_be_silenced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the page quotes, by what the page sets; capfd since ONNX Runtime writes it natively."""
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"`(Initializer [^`]*)`", text)
    (level,) = re.findall(r"`options.log_severity_level = (\d)`", text)
    source = save_example(PATTERN.example().model, tmp_path / "source")
    export_to(source, tmp_path / "out", layers=(1,))

    def logged(severity: int) -> list[str]:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
        options.log_severity_level = severity
        capfd.readouterr()
        onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), options)
        return capfd.readouterr().err.splitlines()

    (line,) = logged(2)
    assert quoted in line
    assert logged(int(level)) == []


def test_the_cpp_program_needs_the_library(next_token: Path, tmp_path: Path) -> None:
    """What it registers is what runs: with another file in its place it fails."""
    done = subprocess.run(
        [str(next_token), str(tmp_path / "none.so"), str(tmp_path / "model.onnx")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "none.so" in done.stderr
