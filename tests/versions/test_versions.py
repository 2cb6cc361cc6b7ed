"""Exports mean the same to every ONNX Runtime, and are the same whichever of them measures.

`make versions` makes the environments; without one its tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.versions.cases import CASES, write_case, write_source

_ROOT: Final = Path(__file__).resolve().parents[2]
_VERSIONS: Final = ("1.22.1", "1.24.4", "1.27.0", "1.31.1", "1.32.0")
_TOLERANCE: Final = 1e-4
_OPSETS: Final = {23: (1, 23), 25: (1, 24)}
"""The first version that opens a model of an opset."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sources/NAME` and `exports/NAME` of every case; `both/NAME` has a source with the calls."""
    folder = tmp_path_factory.mktemp("versions")
    for name, case in CASES.items():
        source = write_source(name, folder / "sources")
        write_case(name, source, folder / "exports")
        if case.same_source:
            shutil.copytree(source.parent, folder / "both" / name)
            shutil.copy(folder / "exports" / name / "calls.npz", folder / "both" / name)
    return folder


@pytest.fixture(params=_VERSIONS, scope="module")
def version(request: pytest.FixtureRequest) -> str:
    """A version with an environment."""
    if not (_environment(request.param) / "complete").is_file():
        pytest.skip(f"needs build/envs/ort-{request.param}: tools/make_versions.sh {request.param}")
    return str(request.param)


def test_exports_give_the_same_numbers(made: Path, version: str) -> None:
    off = _run(version, "tests.versions.run_cases", str(made / "exports"))["off"]
    opened = [name for name in CASES if _opens(name, version)]
    wanted = {f"{name}/{way}" for name in opened for way in ("kernel", "body")}
    assert wanted <= set(off)
    wrong = {name: off[name] for name in wanted if not _is_small(off[name])}
    assert not wrong


def test_sources_mean_what_their_specification_says(made: Path, version: str) -> None:
    """From some version on; an older one gives other numbers than the export, or cannot run it."""
    off = _run(version, "tests.versions.run_cases", str(made / "both"))["off"]
    for name, case in CASES.items():
        if case.same_source is not None:
            since = _numbers(version) >= case.same_source
            assert _is_small(off[f"{name}/kernel"]) == since, (name, off[f"{name}/kernel"])


def test_the_probe_finds_the_same_with_every_version(
    made: Path, version: str, tmp_path: Path
) -> None:
    """Same bytes, unless the version cannot run the source's own operators."""
    given = (str(made / "sources"), str(tmp_path))
    refused = _run(version, "tests.versions.export_there", *given)["refused"]
    assert set(refused) == {name for name in CASES if not _opens(name, version)}
    for name in set(CASES) - set(refused):
        ours = (made / "exports" / name / "model.onnx").read_bytes()
        assert (tmp_path / name / "model.onnx").read_bytes() == ours, name


def _is_small(error: float | str) -> bool:
    return isinstance(error, float) and error <= _TOLERANCE


def _opens(name: str, version: str) -> bool:
    return _numbers(version) >= _OPSETS.get(CASES[name].opset, (1, 0))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _environment(version: str) -> Path:
    return _ROOT / "build" / "envs" / f"ort-{version}"


def _run(version: str, module: str, *arguments: str) -> Any:
    """What a module prints as its last line, run with a version of ONNX Runtime."""
    path = os.pathsep.join([str(_environment(version)), str(_ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=200, cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"] == version
    return result
