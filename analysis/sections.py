"""What the probe takes and gives, section by section: plain numbers, for whoever lacks torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SECTIONS: Final = ("streaming", "middle", "last")


@dataclass(frozen=True)
class ProbeSample:
    """Token ids of a prompt, and the id of the first token of its right answer."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class LayerGradients:
    """One sample's figures, each `[layers][3]` by `SECTIONS`.

    `mean` is the mean of `d y / d theta` over a section's pairs, `mean_abs` that of its absolute
    value. A section without pairs (a prompt so short that nothing is dropped) holds zeros.
    """

    mean: list[list[float]]
    mean_abs: list[list[float]]
