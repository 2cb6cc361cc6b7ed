"""Editors and type checkers find the installed package and its types, from outside the tree.

They read paths and files but run no import hooks (decision 0026).
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
_SETTINGS: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: Final[dict[str, str]] = _SETTINGS["tool"]["scikit-build"]["wheel"]["packages"]
USER: Final = """
from trianglemix.custom_ops.library import library_path

reveal_type(library_path())
library_path() + 1
"""


@pytest.mark.parametrize("package", FOLDERS)
def test_a_path_leads_to_the_folder(package: str) -> None:
    places: list[str] | None = None
    for part in package.split("/"):
        spec = PathFinder.find_spec(part, places)
        assert spec, f"no path leads to {part}; run make setup"
        places = spec.submodule_search_locations
    assert Path(str(spec.origin)).resolve() == ROOT / FOLDERS[package] / "__init__.py"


def test_a_type_checker_elsewhere_knows_the_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Revealed type is "pathlib.Path"' in done.stdout, done.stdout + done.stderr
    assert "Found 1 error" in done.stdout  # the sum, and no missing types
