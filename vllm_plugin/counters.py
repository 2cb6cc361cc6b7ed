"""How many rows each triangle layer streamed, and how many it read densely, since the start.

Attention runs in vLLM's workers, metrics are served by its front end. So each worker keeps its
counts in a small file, mapped into memory, in a folder that both sides know by the engine's name;
the front end adds them up whenever it is asked. Ranks of one tensor-parallel group count the same
rows: only the first of them keeps a file.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import IntArray
from trianglemix.exporter.options import layer_ranges

LOG_SECONDS: Final = 10.0
_COLUMNS: Final = 3  # layer, triangle rows, dense rows
_LOGGER: Final = logging.getLogger("vllm.trianglemix")


@dataclass
class LayerCount:
    """Rows of one layer; `cells` are its layer, its triangle rows and its dense rows."""

    cells: IntArray

    def add(self, triangle_rows: int, dense_rows: int) -> None:
        """Counts one step."""
        self.cells[1] += triangle_rows
        self.cells[2] += dense_rows

    @property
    def triangle_rows(self) -> int:
        """Rows that saw sinks and window only."""
        return int(self.cells[1])

    @property
    def dense_rows(self) -> int:
        """Rows that saw every key before them."""
        return int(self.cells[2])


@dataclass
class CountBoard:
    """The counts of one worker; `folder` None keeps them to itself."""

    folder: Path | None
    counts: list[LayerCount] = field(default_factory=list)
    _logged: float = field(default_factory=time.monotonic)

    def count_layers(self, layers: Iterable[int]) -> list[LayerCount]:
        """New counts, at zero, in a file of their own where there is a folder."""
        wanted = list(layers)
        if not wanted:
            return []
        cells = _cells(self.folder, len(self.counts), len(wanted))
        made = [LayerCount(row) for row in cells]
        for count, layer in zip(made, wanted, strict=True):
            count.cells[0] = layer
        self.counts += made
        return made

    def log_sometimes(self) -> None:
        """A line in the log, at most every `LOG_SECONDS`."""
        if self.counts and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            _LOGGER.info("TriangleMix rows since the start: %s", describe(self.counts))


def describe(counts: Iterable[LayerCount]) -> str:
    """`layers 1-2 triangle 464 dense 43`, layers of like counts together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for count in counts:
        alike.setdefault((count.triangle_rows, count.dense_rows), []).append(int(count.cells[0]))
    return ", ".join(
        f"layers {layer_ranges(layers)} triangle {triangle} dense {dense}"
        for (triangle, dense), layers in alike.items()
    )


def count_folder(engine: str) -> Path:
    """Where the workers of an engine on this machine keep their counts."""
    return Path(tempfile.gettempdir()) / f"trianglemix-{os.getuid()}-{engine}"


def read_counts(folders: Iterable[Path]) -> dict[int, tuple[int, int]]:
    """By layer its triangle and its dense rows, the files of all folders added up."""
    totals: dict[int, tuple[int, int]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.counts")):
            for layer, triangle, dense in np.fromfile(path, np.int64).reshape(-1, _COLUMNS):
                old = totals.get(int(layer), (0, 0))
                totals[int(layer)] = (old[0] + int(triangle), old[1] + int(dense))
    return totals


def _cells(folder: Path | None, number: int, layers: int) -> IntArray:
    if folder is None:
        return np.zeros((layers, _COLUMNS), np.int64)
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{os.getpid()}-{number}.counts"
    return np.asarray(np.memmap(path, np.int64, "w+", shape=(layers, _COLUMNS)))
