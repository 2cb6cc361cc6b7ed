"""What the rule keeps of each layer: figures of a prompt, and their means. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class BlockFigures:
    """One layer under the rule at one mass; shares from 0 to 1.

    `density` is what is kept of the causal block pairs, dense tiles and forced blocks included;
    `exact` the same where blocks are chosen by every row's attention and not by eight rows'. The
    recall of a tile of one head is the share of its rows' attention that lies in kept blocks:
    `recall` is the mean, `low` the 5th percentile over tiles and heads, `worst` the mean of the
    head that has the least. Tiles that cannot drop a block do not count.
    """

    density: float
    exact: float
    recall: float
    low: float
    worst: float


@dataclass(frozen=True)
class BlockSample:
    """One prompt: its tokens, and five figures for each layer and mass, as measured."""

    tokens: int
    values: list[list[list[float]]]


Measured = Mapping[int, Mapping[int, Mapping[float, BlockFigures]]]
"""By prompt length in tokens, layer, and mass."""


def mean_figures(
    samples: Sequence[BlockSample], layers: Sequence[int], masses: Sequence[float]
) -> Measured:
    """The mean over the prompts of one length, of each figure."""
    lengths = sorted({sample.tokens for sample in samples})
    return {
        tokens: {
            layer: {
                mass: _mean([s.values[i][j] for s in samples if s.tokens == tokens])
                for j, mass in enumerate(masses)
            }
            for i, layer in enumerate(layers)
        }
        for tokens in lengths
    }


def _mean(rows: Sequence[Sequence[float]]) -> BlockFigures:
    return BlockFigures(*(mean(column) for column in zip(*rows, strict=True)))


def mean_of_layers(
    figures: Mapping[int, Mapping[float, BlockFigures]], mass: float
) -> BlockFigures:
    """The mean over layers at one mass."""
    return _mean([astuple(by_mass[mass]) for by_mass in figures.values()])


def as_json(measured: Measured) -> dict[str, Any]:
    """For a plan's figures; four digits."""
    return {
        str(tokens): {
            str(layer): {
                f"{mass:g}": {name: round(value, 4) for name, value in asdict(figures).items()}
                for mass, figures in by_mass.items()
            }
            for layer, by_mass in by_layer.items()
        }
        for tokens, by_layer in measured.items()
    }
