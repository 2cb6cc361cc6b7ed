"""The output folder appears whole or not at all, also where two exports want the same one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.folder.output_folder import output_folder
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import save_example


def test_the_slower_of_two_exports_does_not_replace_the_first(tmp_path: Path) -> None:
    place = tmp_path / "out"

    def slower() -> None:
        with output_folder(place, force=False) as folder:
            (folder / "manifest.json").write_text("slower")
            place.mkdir()
            (place / "manifest.json").write_text("first")

    with pytest.raises(ExportError, match="--force replaces it"):
        slower()
    assert (place / "manifest.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


BETWEEN: Final = """
import os, sys, time
from pathlib import Path
from trianglemix.exporter.folder import output_folder as module
place, moment = Path(sys.argv[1]), sys.argv[2]
rename = os.rename
def stop(*names):
    if moment == "renaming" and names[0].name.startswith(".out.unfinished"):
        print("here", flush=True)
        time.sleep(60)
    rename(*names)
os.rename = stop
with module.output_folder(place, force=True) as folder:
    (folder / "manifest.json").write_text("new")
    if moment == "writing":
        print("here", flush=True)
        time.sleep(60)
"""


def _started(place: Path, moment: str) -> subprocess.Popen[str]:
    """An export that stands still at a moment."""
    command = [sys.executable, "-c", BETWEEN, str(place), moment]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def _export(place: Path) -> None:
    with output_folder(place, force=True) as folder:
        (folder / "manifest.json").write_text("mine")


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_what_a_killed_export_left_is_put_away(moment: str, earlier: bool, tmp_path: Path) -> None:
    place = tmp_path / "out"
    if earlier:
        _export(place)
    with _started(place, moment) as process:
        process.kill()
    assert len(list(tmp_path.iterdir())) > (moment == "writing" and earlier)
    if earlier and moment == "renaming":
        with (
            pytest.raises(ExportError, match="--force replaces it"),
            output_folder(place, force=False),
        ):
            pass
        assert (place / "manifest.json").read_text() == "mine", "the earlier export is back"
    _export(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (place / "manifest.json").read_text() == "mine"


def test_an_export_that_runs_keeps_its_folder(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with _started(place, "writing") as process:
        (partial,) = tmp_path.iterdir()
        old = time.time() - 1000
        os.utime(partial, (old, old))
        _export(place)
        assert sorted(x.name for x in tmp_path.iterdir()) == [partial.name, "out"]
        process.kill()


def test_names_that_only_look_like_ours_stay(tmp_path: Path) -> None:
    names = [".out.unfinished-", ".out.unfinished-x", ".out2.unfinished-1", ".out.unfinished-1.txt"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.unfinished-2").symlink_to(tmp_path / names[0])
    _export(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == len(names) + 2


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """The command itself: nothing half-done looks finished, and the next run succeeds."""
    source = save_example(PATTERN.example().model, tmp_path)
    arguments = [str(source), "-o", str(tmp_path / "out"), "--layers", "1", "--force", "--quiet"]
    code = "import sys; from trianglemix.exporter.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    before = source.read_bytes()
    for delay in (0.6, 0.8, 1.0, 1.2, 1.4):
        with subprocess.Popen(command) as process:
            time.sleep(delay)
            process.kill()
        if (tmp_path / "out").exists():
            Manifest.load(tmp_path / "out")
    subprocess.run(command, check=True)
    Manifest.load(tmp_path / "out")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model.onnx", "out"]
    assert source.read_bytes() == before
