"""A model with 5 GB of weights is rewritten beside its data without reading them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.make_big_model import make_big_model

_MEMORY = 400 << 20  # bytes, of the whole process
_PROCESSOR_SECONDS = 4.0


def _export(source: Path, output: Path) -> tuple[float, int]:
    """Processor seconds and peak bytes of `trianglemix-export`, process start included."""
    program = (
        "import resource, sys; from trianglemix.exporter.cli import command\n"
        "command.main(sys.argv[1:], standalone_mode=False)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "status = open('/proc/self/status').read().split()\n"
        "peak = int(status[status.index('VmHWM:') + 1])\n"  # ru_maxrss counts the parent's, too
        "print(usage.ru_utime + usage.ru_stime, peak * 1024)"
    )
    arguments = [str(source), "-o", str(output), "--layers=16-31", "--weights=link", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(float(peak))


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_neither_read_nor_copied(tmp_path: Path, shards: int) -> None:
    size = make_big_model(tmp_path / "big", shards=shards)
    assert size > 5e9
    seconds, peak = _export(tmp_path / "big" / "model.onnx", tmp_path / "out")
    assert peak < _MEMORY
    assert seconds < _PROCESSOR_SECONDS
    names = sorted(path.name for path in (tmp_path / "big").glob("*.data*"))
    assert len(names) == shards
    for name in names:
        source, linked = tmp_path / "big" / name, tmp_path / "out" / name
        assert source.stat().st_ino == linked.stat().st_ino
