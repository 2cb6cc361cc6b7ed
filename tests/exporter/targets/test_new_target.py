"""A new target is a new file or folder in `exporter/targets/`, and nothing else.

New source patterns and evaluation tasks are found the same way: `tests/exporter/patterns/
test_patterns.py` and `tests/evaluation/test_tasks.py` run every one that the folders hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import save_example

TOYS: Final = Path(__file__).with_name("toys")
_EXPORT: Final = f"""
import trianglemix.exporter.targets as targets
targets.__path__.append({str(TOYS)!r})
from trianglemix.exporter.cli import main
main()
"""
_LAYERS: Final = ("--layers", "1", "--sink", "2", "--window", "6", "--last", "3")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The exporter's command line, with the toys' folder as a part of `targets/`."""
    command = [sys.executable, "-c", _EXPORT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_example(PATTERN.example().model, tmp_path_factory.mktemp("source"))


def exported(source: Path, folder: Path, *options: str) -> tuple[str, dict[str, object]]:
    """What was printed, and the report, of an export that is verified."""
    done = run(source, "-o", folder, "--verify", *_LAYERS, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "export_report.json").read_text(encoding="utf-8"))
    assert report["verification"]
    assert all(check["passed"] for check in report["verification"])
    return done.stdout, report


def test_help_has_them_and_their_options() -> None:
    text = " ".join(run("--help").stdout.split())
    for target, option in (("pace", "--pace"), ("crate", "--crate-label")):
        assert f"{target}: a toy" in text
        assert f"{option} " in text


def test_a_target_in_one_file(source: Path, tmp_path: Path) -> None:
    options = ("--target", "pace", "--pace", "200", "--prompt-length", "1000")
    printed, report = exported(source, tmp_path / "out", *options)
    assert "takes 5 s" in printed
    assert report["prediction"] == {"seconds": 5.0}
    assert [layer["runs_as"] for layer in report["layers"]] == [
        "GroupQueryAttention", "TriangleAttention", "GroupQueryAttention",
    ]  # fmt: skip
    assert Manifest.load(tmp_path / "out").target == "pace"


def test_a_target_in_a_folder(source: Path, tmp_path: Path) -> None:
    printed, report = exported(source, tmp_path / "out", "--target", "crate")
    assert "crated" in printed
    assert report["prediction"]["nodes"] > 0
    assert Manifest.load(tmp_path / "out").model_file == "crate.onnx"


def test_its_option_with_another_target_is_refused_by_itself(source: Path, tmp_path: Path) -> None:
    done = run(source, "-o", tmp_path / "out", "--target", "crate", "--pace", "5")
    assert done.returncode == 2
    assert "--pace belongs to --target pace" in done.stderr
