"""The output folder appears whole or not at all, also where two exports want the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.folder.output_folder import output_folder


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
