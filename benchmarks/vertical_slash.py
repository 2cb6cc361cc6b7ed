"""MInference's vertical-slash pattern around its own kernels: estimate, indexes, density, mask.

The estimate is restated from `minference/modules/minference_forward.py` of 0.1.6 (there inside a
model's forward, a head at a time): the softmax of the last 64 rows, summed by column and by
diagonal; the first 30 columns and the nearest 100 diagonals always count. The package makes blocks
of 64 x 64 along the diagonals and lists of single columns of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import pad

BLOCK: Final = 64
PROBE: Final = 64  # last rows that the estimate reads
FIRST: Final = 30
NEAREST: Final = 100


def load_minference() -> Any:
    """The module of the kernels, without the package's `__init__`.

    That one imports `kivi_gemv` if transformers says that it is there; transformers 5 answers with
    a pair, `(False, None)`, which counts as true.

    Raises:
        ImportError: minference or its extension `minference.cuda` is not there.
    """
    if "minference" not in sys.modules:
        found = importlib.util.find_spec("minference")
        if found is None or found.submodule_search_locations is None:
            raise ImportError("No module named 'minference'")
        bare = types.ModuleType("minference")
        bare.__path__ = list(found.submodule_search_locations)
        sys.modules["minference"] = bare
    return importlib.import_module("minference.ops.pit_sparse_flash_attention_v2")


def estimate(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last rows by column `[1, H, S]` and by diagonal `[1, H, S]`.

    Query and key are `[1, H, S, D]`; diagonal e has the distance `S - 1 - e`.
    """
    S, scale = query.shape[2], 1 / math.sqrt(query.shape[-1])
    scores = query[:, :, -PROBE:] @ key.transpose(2, 3) * scale
    at = torch.arange(PROBE, device=query.device)
    scores[..., -PROBE:].masked_fill_(at[:, None] < at[None], -math.inf)
    weights = scores.softmax(-1, dtype=torch.float32)
    columns = weights.sum(2)
    columns[..., :FIRST] = math.inf
    # Row r of the padded weights begins PROBE columns early: read from r + 1, diagonals line up.
    padded = pad(weights, (PROBE, 0))
    wide = padded.shape[-1]
    lined = padded.as_strided(
        (*padded.shape[:2], PROBE, S), (*padded.stride()[:2], wide + 1, 1), 1
    )  # fmt: skip
    diagonals = lined.sum(2)
    diagonals[..., -NEAREST:] = math.inf
    return columns, diagonals


def pick(
    columns: torch.Tensor, diagonals: torch.Tensor, vertical: int, slash: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns `[1, H, vertical]` and the distances `[1, H, slash]` of the largest sums."""
    S = columns.shape[-1]
    vertical, slash = min(S, max(vertical, FIRST)), min(S, max(slash, 50))
    return columns.topk(vertical, -1).indices, S - 1 - diagonals.topk(slash, -1).indices


@dataclass(frozen=True)
class Indexes:
    """What the package makes of columns and distances; counts `[1, H, S / 64]`, lists one more."""

    block_count: torch.Tensor
    block_offset: torch.Tensor
    column_count: torch.Tensor
    column_index: torch.Tensor

    @property
    def density(self) -> float:
        """Computed share of causal pairs, both counted in blocks of 64 rows."""
        rows = self.block_count.shape[-1]
        pairs = self.block_count.double().sum() * BLOCK + self.column_count.double().sum()
        return float(pairs / (self.block_count.shape[1] * rows * (rows + 1) / 2 * BLOCK))

    def keeps(self, head: int, rows: torch.Tensor) -> torch.Tensor:
        """Kept keys `[R, S]` of a head's rows."""
        S = self.block_count.shape[-1] * BLOCK
        kept = torch.zeros(len(rows), S, dtype=torch.bool, device=rows.device)
        for number, row in enumerate((rows // BLOCK).tolist()):
            blocks = self.block_offset[0, head, row, : int(self.block_count[0, head, row])]
            inside = blocks.long()[:, None] + torch.arange(BLOCK, device=rows.device)
            kept[number, inside.flatten()] = True
            columns = self.column_index[0, head, row, : int(self.column_count[0, head, row])]
            kept[number, columns.long()] = True
        return kept


def index_for(
    convert: Callable[..., list[torch.Tensor]], verticals: torch.Tensor, slashes: torch.Tensor,
    tokens: int,
) -> Indexes:  # fmt: skip
    """The package's indexes by its own `convert_vertical_slash_indexes`, given what it is given."""
    columns = verticals.int().sort(-1).values
    away = slashes.int().sort(-1, descending=True).values
    lengths = torch.tensor([tokens], dtype=torch.int32, device=columns.device)
    return Indexes(*convert(lengths, columns, away, tokens, BLOCK, BLOCK))


def size_for(density: Callable[[int], float], tokens: int, wanted: float) -> int:
    """How many slashes come nearest to the density, in nine trials; more never keep less."""
    low, high, best = NEAREST, tokens, (math.inf, NEAREST)
    for _ in range(9):
        middle = round(math.sqrt(low * high))
        got = density(middle)
        best = min(best, (abs(got - wanted), middle))
        low, high = (middle, high) if got < wanted else (low, middle)
    return best[1]
