"""Runs a program in an environment of `source_models/matrix.py`, where other packages live."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

ENVIRONMENTS: Final = Path(__file__).resolve().parents[2] / "build" / "envs"
_SOURCES: Final = ENVIRONMENTS.parent / "sources"


def run_program(environment: str, program: str, arguments: dict[str, Any]) -> Any:
    """What the program prints as its last line, read as JSON; it finds `arguments` in argv[1].

    Raises:
        AssertionError: it fails; the message holds its last lines.
    """
    python = ENVIRONMENTS / environment / "bin" / "python"
    done = subprocess.run(
        [str(python), "-c", program, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def made_source(environment: str, route: str, family: str) -> Path:
    """The folder of a made model; without it, or its environment, the test is skipped, loudly."""
    folder = _SOURCES / route / family
    complete = (ENVIRONMENTS / environment / "complete").is_file()
    if not complete or not list(folder.glob("*.onnx")):
        pytest.skip(
            f"needs build/sources/{route}/{family} and build/envs/{environment}: "
            f"python -m source_models.matrix --routes {route} --families {family}"
        )
    return folder
