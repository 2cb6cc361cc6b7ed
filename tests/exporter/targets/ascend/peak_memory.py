"""Measures the peak resident memory of reading one prompt in static graphs on ONNX Runtime.

python -m tests.exporter.targets.ascend.peak_memory   # the table of docs/experiments.md
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper
from trianglemix.exporter.options import LayerRequest
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import (
    LAST,
    export_ascend,
    last_logits,
    prompt,
    tiny_source,
)
from tests.exporter.targets.ascend.half_model import save_half

CHUNK: Final = 128
SHORT, LONG = 2048, 16384
ROOT: Final = Path(__file__).resolve().parents[4]
_MIB: Final = 2**20


@dataclass(frozen=True)
class Peak:
    """MiB: what one process held at most, and how much of it is the cache."""

    peak: float
    cache: float


def long_source(folder: Path) -> Path:
    """The tiny Llama in float16 with a context of 32K; after 2,048 its rotation starts again."""
    folder.mkdir()
    source = tiny_source("llama")
    path = save_half(source, folder / "model.onnx")
    model = onnx.load(path)
    for table in model.graph.initializer:
        if table.name in ("cos_cache", "sin_cache"):
            longer = np.tile(numpy_helper.to_array(table), (2 * LONG // table.dims[0], 1))
            table.CopyFrom(numpy_helper.from_array(longer, table.name))
    onnx.save(model, path)
    config = json.loads((source.parent / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 2 * LONG
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def export_for(source: Path, output: Path, slots: int, lowering: str, layers: LayerRequest) -> Path:
    """A folder whose cache has `slots` tokens."""
    request = AscendRequest("Ascend910B3", CHUNK, slots, None, lowering)  # type: ignore[arg-type]
    export_ascend(source, output, request, layers)
    return output


def measure(folder: Path, length: int, part: str = "whole") -> Peak:
    """A prompt of `length` tokens in a process of its own; `part` "stream" leaves its tail out."""
    module = "tests.exporter.targets.ascend.peak_memory"
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), str(length), part],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    static = Manifest.load(folder).static
    assert static is not None
    held = {t.name: t.nbytes for g in (static.stream, static.tail) for t in g.inputs}
    cache = sum(size for name, size in held.items() if name.startswith("cache."))
    return Peak(float(done.stdout) / _MIB, cache / _MIB)


def _read_prompt(folder: Path, length: int, part: str) -> None:
    session = TriangleSession.from_folder(folder, threads=2)
    ids = prompt(length)
    if part == "stream":
        rows = np.array([ids[:-LAST]])
        session.new_cache().extend(rows, None, length, want_logits=False)
    else:
        last_logits(session, ids)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


def _table() -> None:
    with tempfile.TemporaryDirectory() as place:
        source = long_source(Path(place) / "source")
        print("layers | lowering | cache tokens | prompt | whole MiB | its chunks MiB | cache MiB")
        for name, layers in (
            ("all triangle", LayerRequest(start_layer=0)),
            ("2 of 3 triangle", LayerRequest(layers=(1, 2))),
        ):
            for lowering in ("block", "custom"):
                for slots, lengths in ((SHORT, (SHORT,)), (LONG, (SHORT, LONG))):
                    folder = Path(place) / f"{name}-{lowering}-{slots}"
                    export_for(source, folder, slots, lowering, layers)
                    for length in lengths:
                        whole, stream = (measure(folder, length, p) for p in ("whole", "stream"))
                        print(f"{name} | {lowering} | {slots} | {length} | {whole.peak:.0f} | "
                              f"{stream.peak:.0f} | {whole.cache:.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _read_prompt(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        _table()
