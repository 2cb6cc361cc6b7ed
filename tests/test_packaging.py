"""A wheel can be built of the repository, and holds every package that the links name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]


def test_the_build_backend_takes_the_settings() -> None:
    """An editable install overrides what a wheel is made of, so it would not notice."""
    code = "from scikit_build_core.build import get_requires_for_build_wheel as ask; print(ask())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_linked_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages = settings["scikit-build"]["wheel"]["packages"]
    cmake = (ROOT / "custom_ops" / "CMakeLists.txt").read_text(encoding="utf-8")
    installed = set(re.findall(r"DESTINATION (trianglemix/\w+) FILES_MATCHING", cmake))
    links = [x for x in (ROOT / "package" / "trianglemix").iterdir() if x.is_symlink()]
    assert len(links) == len(packages) - 1 + len(installed)  # all but the root's own
    assert {f"trianglemix/{link.name}" for link in links} <= packages.keys() | installed
