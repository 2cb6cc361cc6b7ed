"""What do block-sparse layers cost on the CPU, beside triangle and dense ones? One run, one table.

Random inputs have no structure: `mass` is set so that a wanted share of the causal blocks is kept
(forced ones included), read back from `block_mask`. All contenders of a shape run in turn, round
after round; the table has medians. All of them append the new tokens to the cache.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from onnx import helper
from rich.console import Console
from rich.table import Table
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE, OUTPUTS, BlockRule
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern

from benchmarks.device_time import Run
from benchmarks.kernel_cpu import (
    THREADS,
    Shape,
    Tensors,
    interleave,
    lengths_of,
    open_session,
    ours,
    with_cache,
)
from benchmarks.machine import describe_run, save_result

PATTERN: Final = TrianglePattern()
SHAPES: Final = (
    Shape("H9 G3 D64, 8K", 9, 3, 64, 8192, 8192, PATTERN),
    Shape("H9 G3 D64, 8K float16", 9, 3, 64, 8192, 8192, PATTERN, "float16"),
    Shape("H8 G2 D128, 8K", 8, 2, 128, 8192, 8192, PATTERN),
    Shape("H9 G3 D64, 32K", 9, 3, 64, 32768, 32768, PATTERN),
)
DENSITIES: Final = (0.15, 0.30)
NEAR: Final = 0.005
ALL_KEPT: Final = BlockRule(mass=1 - 1e-6, min_length=0)
"""Scores are computed, and on random inputs every block is kept."""


class NoMassError(Exception):
    """No mass gives the wanted density."""


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and the share of causal blocks that was kept."""

    shape: str
    contender: str
    median_ms: float
    density: float | None = None
    mass: float | None = None


def density(shape: Shape, tensors: Tensors, rule: BlockRule) -> float:
    """Kept share of the causal pairs of tile and block."""
    node = helper.make_node(
        OP_TYPE, list(contract.INPUTS[:7]), list(OUTPUTS),
        domain=contract.DOMAIN, num_heads=shape.num_heads, kv_num_heads=shape.kv_num_heads,
        **rule.as_attributes(),
    )  # fmt: skip
    session = open_session(node, shape, library_path())
    arrays = [tensors.query, tensors.key, tensors.value, *tensors.past]
    feeds = dict(zip(contract.INPUTS[:5], arrays, strict=True)) | lengths_of(shape)
    (mask,) = session.run(["block_mask"], feeds)
    tiles = mask.shape[-1]
    return float(np.count_nonzero(mask) / (shape.num_heads * tiles * (tiles + 1) / 2))


def mass_for(shape: Shape, tensors: Tensors, wanted: float) -> tuple[float, float]:
    """The mass at which a call keeps the wanted share, and what it keeps.

    Raises:
        NoMassError: no mass does, as where the forced blocks are more.
    """
    low, high = 0.0, 1.0
    for _ in range(16):
        mass = (low + high) / 2
        kept = density(shape, tensors, BlockRule(mass=mass, min_length=0))
        if abs(kept - wanted) < NEAR:
            return mass, kept
        low, high = (mass, high) if kept < wanted else (low, mass)
    raise NoMassError(f"{shape.name}: no mass keeps {wanted} of the blocks; nearest {kept:.3f}")


def measure(shape: Shape, rounds: int) -> list[Timing]:
    """Times all contenders of one shape."""
    tensors = Tensors(shape)
    rules = {"block-sparse, every block": (ALL_KEPT, density(shape, tensors, ALL_KEPT))}
    for wanted in DENSITIES:
        mass, kept = mass_for(shape, tensors, wanted)
        rules[f"block-sparse at {wanted:.2f}"] = BlockRule(mass=mass, min_length=0), kept
    runs: dict[str, Run] = {
        "dense": ours(shape, tensors, DENSE_PATTERN, library_path()),
        "triangle": ours(shape, tensors, PATTERN, library_path()),
    }
    for name, (rule, _) in rules.items():
        kind = (OP_TYPE, contract.DOMAIN)
        runs[name] = with_cache(kind, shape, tensors, rule.as_attributes(), library_path())
    timings = []
    for name, seconds in interleave(runs, rounds).items():
        rule, kept = rules.get(name, (None, None))
        median = statistics.median(seconds) * 1e3
        timings.append(Timing(shape.name, name, median, kept, rule.mass if rule else None))
    return timings


def print_table(timings: list[Timing]) -> None:
    table = Table(title=f"CPU, block-sparse attention, {THREADS} threads, medians")
    for column in ("shape", "layer", "ms", "of dense", "kept blocks", "mass"):
        left = column in ("shape", "layer")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    dense = {t.shape: t.median_ms for t in timings if t.contender == "dense"}
    for t in timings:
        first = t.contender == "dense"
        if first:
            table.add_section()
        table.add_row(
            t.shape if first else "",
            t.contender,
            f"{t.median_ms:.1f}",
            f"{t.median_ms / dense[t.shape]:.3f}",
            "" if t.density is None else f"{t.density:.3f}",
            "" if t.mass is None else f"{t.mass:.3g}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each shape (default 5)")
    rounds: int = parser.parse_args().rounds
    run = describe_run(["onnxruntime", "numpy"], THREADS)
    timings = [timing for shape in SHAPES for timing in measure(shape, rounds)]
    print_table(timings)
    content = {
        "run": run,
        "shapes": [asdict(shape) for shape in SHAPES],
        "timings": [asdict(timing) for timing in timings],
    }
    print(f"written to {save_result('block_sparse_cpu', content)}")


if __name__ == "__main__":
    main()
