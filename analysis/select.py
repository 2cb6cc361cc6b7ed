"""From gradients to layers: the ranking, the rules, and how sure the ranking is.

A layer's importance is the mean over the samples of its mean absolute Middle gradient. Triangle
layers are taken from the least important upwards: a number of them, or all whose importance is at
most a share of the most important layer's, or as many as a check on tasks allows (`check.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.sections import SECTIONS, LayerGradients

_MIDDLE: Final = SECTIONS.index("middle")


@dataclass(frozen=True)
class Importance:
    """`mean` and `mean_abs`, each `[layers, 3]` by section, averaged over the samples.

    `half_correlation` is the rank correlation of the importance between the two halves of the
    samples (every second one); None with fewer than two samples.
    """

    mean: NDArray[np.float64]
    mean_abs: NDArray[np.float64]
    half_correlation: float | None

    @property
    def middle(self) -> NDArray[np.float64]:
        """`[layers]`: the importance of each layer."""
        return self.mean_abs[:, _MIDDLE]


def importance_of(samples: Sequence[LayerGradients]) -> Importance:
    """Averages the samples.

    Raises:
        AnalysisError: no sample, or prompts so short that they have no Middle section.
    """
    if not samples:
        raise AnalysisError("there are no samples to average; probe at least one")
    mean = np.array([s.mean for s in samples])
    mean_abs = np.array([s.mean_abs for s in samples])
    middle = mean_abs[:, :, _MIDDLE]
    if not middle.any():
        raise AnalysisError(
            "the prompts have no Middle section (nothing would be dropped of them); ask for "
            "longer prompts or a smaller pattern"
        )
    halves = None
    if len(samples) > 1:
        halves = rank_correlation(middle[::2].mean(axis=0), middle[1::2].mean(axis=0))
    return Importance(mean.mean(axis=0), mean_abs.mean(axis=0), halves)


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of two rankings without ties."""
    ranks = [np.argsort(np.argsort(x)).astype(np.float64) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def ranked_layers(importance: Importance, candidates: Sequence[int]) -> tuple[int, ...]:
    """Candidates, the least important first; of equals the deeper one."""
    middle = importance.middle
    return tuple(sorted(candidates, key=lambda layer: (middle[layer], -layer)))


def layers_under_threshold(
    importance: Importance, ranked: Sequence[int], share: float
) -> tuple[int, ...]:
    """Layers whose importance is at most `share` of the most important layer's, least first."""
    limit = share * importance.middle[list(ranked)].max()
    return tuple(layer for layer in ranked if importance.middle[layer] <= limit)


class TriangleMixAnalyzer:
    """For people who bring their own gradients: records them, names the least important layers."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._totals: list[list[float]] = [[] for _ in range(num_layers)]

    def record_middle_qk_gradient(self, layer_idx: int, gradient: Any) -> None:
        """Adds one sample's Middle gradient of a layer: any tensor or array.

        Its mean absolute value is what counts: values of both signs must not cancel out.

        Raises:
            AnalysisError: no such layer, or nothing finite to average.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise AnalysisError(
                f"layer_idx is {layer_idx}, but the model has {self.num_layers} layers "
                f"(0-{self.num_layers - 1})"
            )
        values = gradient.detach().float().cpu() if hasattr(gradient, "detach") else gradient
        size = float(np.abs(np.asarray(values, dtype=np.float64)).mean()) if len(values) else np.nan
        if not np.isfinite(size):
            raise AnalysisError(f"the gradient of layer {layer_idx} is empty or not finite")
        self._totals[layer_idx].append(size)

    def get_triangle_layers(self, num_triangle_layers: int) -> list[int]:
        """The `num_triangle_layers` layers of least importance, ascending.

        Raises:
            AnalysisError: more layers than there are, or a layer without a recorded gradient.
        """
        missing = [layer for layer, values in enumerate(self._totals) if not values]
        if missing:
            raise AnalysisError(
                f"no gradient was recorded for layers {missing}; record every layer first"
            )
        if not 1 <= num_triangle_layers <= self.num_layers:
            raise AnalysisError(
                f"num_triangle_layers is {num_triangle_layers}, but must be from 1 to "
                f"{self.num_layers}"
            )
        means = [float(np.mean(values)) for values in self._totals]
        order = sorted(range(self.num_layers), key=lambda layer: (means[layer], -layer))
        return sorted(order[:num_triangle_layers])

    def reset(self) -> None:
        """Forgets what was recorded."""
        self._totals = [[] for _ in range(self.num_layers)]
