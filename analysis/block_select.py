"""The rule by which a plan's block-sparse layers and their mass are chosen, in one place.

At the longest prompts that were measured a layer is *faithful* at a mass where the 5th percentile
of its recall is at least `LOW_RECALL` and its worst head's at least `WORST_HEAD`. The layers that
are faithful at the largest mass tried take part. The mass is the smallest at which all of them are.
Of them those stay dense that keep more than `MOST_KEPT` of their blocks at that mass: there the
scores would cost about what they save. Prompts shorter than `SHORTEST` of the shortest measured
length stay dense, since nobody looked at them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from trianglemix.analysis.block_shares import BlockFigures, Measured
from trianglemix.analysis.errors import AnalysisError
from trianglemix.custom_ops.block_sparse.contract import BlockRule

LOW_RECALL: Final = 0.7
WORST_HEAD: Final = 0.75
MOST_KEPT: Final = 0.6
SHORTEST: Final = 7 / 8
RULE: Final = (
    f"the smallest mass at which each layer's recall has a 5th percentile of at least {LOW_RECALL} "
    f"and a worst head of at least {WORST_HEAD}; layers that cannot, or that keep more than "
    f"{MOST_KEPT} of their blocks, stay dense"
)


@dataclass(frozen=True)
class BlockChoice:
    """The layers and the rule, and why each other layer stays dense."""

    layers: tuple[int, ...]
    rule: BlockRule
    left_out: Mapping[int, str]


def choose_block_layers(measured: Measured) -> BlockChoice:
    """By the rule of this module.

    Raises:
        AnalysisError: no layer is left.
    """
    longest = measured[max(measured)]
    masses = sorted(next(iter(longest.values())))
    left_out: dict[int, str] = {}
    for layer, by_mass in longest.items():
        if not _is_faithful(by_mass[masses[-1]]):
            left_out[layer] = _unfaithful(by_mass[masses[-1]], masses[-1])
    faithful = [layer for layer in longest if layer not in left_out]
    mass = next(
        (m for m in masses if all(_is_faithful(longest[x][m]) for x in faithful)), masses[-1]
    )
    for layer in faithful:
        density = longest[layer][mass].density
        if density > MOST_KEPT:
            left_out[layer] = f"keeps {density:.2f} of its blocks at mass {mass:g}"
    layers = tuple(layer for layer in longest if layer not in left_out)
    if not layers:
        reasons = "; ".join(f"layer {layer} {why}" for layer, why in left_out.items())
        other = "smaller ones" if faithful else "a larger one"
        raise AnalysisError(
            f"no layer may be block-sparse ({reasons}); try longer prompts, where heads keep less, "
            f"or other masses: {other}"
        )
    rule = BlockRule(mass=mass, min_length=shortest_sparse(measured))
    return BlockChoice(layers, rule, left_out)


def shortest_sparse(lengths: Collection[int]) -> int:
    """`min_length` of layers that were measured at these lengths."""
    return int(SHORTEST * min(lengths))


def _is_faithful(figures: BlockFigures) -> bool:
    return figures.low >= LOW_RECALL and figures.worst >= WORST_HEAD


def _unfaithful(figures: BlockFigures, mass: float) -> str:
    return (
        f"has recall {figures.low:.2f} at the 5th percentile and {figures.worst:.2f} in its worst "
        f"head at mass {mass:g}"
    )
