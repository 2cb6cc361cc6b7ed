"""How many rows of each layer were ours, and how many it read densely, since the start.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import IntArray
from trianglemix.exporter.options import layer_ranges
from trianglemix.vllm.roles import ROLES

LOG_SECONDS: Final = 10.0
DENSE: Final = "dense"
_COLUMNS: Final = 4  # layer, role (its place in ROLES), rows that were ours, dense rows
_LOGGER: Final = logging.getLogger("vllm.trianglemix")


@dataclass
class LayerCount:
    """Rows of one layer; `cells` are its layer, its role, its rows of that kind, its dense rows."""

    cells: IntArray

    def add(self, our_rows: int, dense_rows: int) -> None:
        """Counts one step."""
        self.cells[2] += our_rows
        self.cells[3] += dense_rows

    @property
    def layer(self) -> int:
        """The layer's number."""
        return int(self.cells[0])

    @property
    def rows(self) -> dict[str, int]:
        """By kind: `triangle` or `block_sparse`, and `dense` for rows that saw every key."""
        return {ROLES[int(self.cells[1])]: int(self.cells[2]), DENSE: int(self.cells[3])}


@dataclass
class CountBoard:
    """The counts of one worker; `folder` None keeps them to itself."""

    folder: Path | None
    counts: list[LayerCount] = field(default_factory=list)
    _logged: float = field(default_factory=time.monotonic)

    def count_layers(self, roles: Sequence[tuple[int, str]]) -> list[LayerCount]:
        """New counts of layers with their roles, at zero, in a file where there is a folder."""
        if not roles:
            return []
        cells = _cells(self.folder, len(self.counts), len(roles))
        made = [LayerCount(row) for row in cells]
        for count, (layer, role) in zip(made, roles, strict=True):
            count.cells[:2] = layer, ROLES.index(role)
        self.counts += made
        return made

    def log_sometimes(self) -> None:
        """A line in the log, at most every `LOG_SECONDS`."""
        if self.counts and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            _LOGGER.info("TriangleMix rows since the start: %s", describe(self.counts))


def describe(counts: Iterable[LayerCount]) -> str:
    """`layers 1-2 triangle 464 dense 43`, layers of like counts together."""
    alike: dict[str, list[int]] = {}
    for count in counts:
        text = " ".join(f"{kind} {rows}" for kind, rows in count.rows.items())
        alike.setdefault(text, []).append(count.layer)
    return ", ".join(f"layers {layer_ranges(layers)} {text}" for text, layers in alike.items())


def count_folder(engine: str) -> Path:
    """Where the workers of an engine on this machine keep their counts."""
    return Path(tempfile.gettempdir()) / f"trianglemix-{os.getuid()}-{engine}"


def read_counts(folders: Iterable[Path]) -> dict[int, dict[str, int]]:
    """By layer its rows of each kind, the files of all folders added up."""
    totals: dict[int, dict[str, int]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.counts")):
            for cells in np.fromfile(path, np.int64).reshape(-1, _COLUMNS):
                count = LayerCount(cells)
                total = totals.setdefault(count.layer, {})
                for kind, rows in count.rows.items():
                    total[kind] = total.get(kind, 0) + rows
    return totals


def _cells(folder: Path | None, number: int, layers: int) -> IntArray:
    if folder is None:
        return np.zeros((layers, _COLUMNS), np.int64)
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{os.getpid()}-{number}.counts"
    return np.asarray(np.memmap(path, np.int64, "w+", shape=(layers, _COLUMNS)))
