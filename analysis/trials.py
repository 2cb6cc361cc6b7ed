"""Scores of a model with a set of triangle layers, on a task, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.run import Setup, run_model


@dataclass(frozen=True)
class TaskScorer:
    """Answers the same samples with any set of triangle layers; `progress` hears of each answer."""

    model: HuggingFaceModel
    setup: Setup
    progress: Callable[[str], None]

    def __call__(self, layers: Sequence[int]) -> list[float]:
        """Scores from 0 to 1, one a sample; no layers means dense."""
        self.model.use_layers(layers)
        name = f"{len(layers)} triangle layers" if layers else "dense"
        return run_model(name, lambda: self.model, self.setup, self.progress).scores()


def open_model(folder: Path, device: str, dtype: str, pattern: TrianglePattern) -> HuggingFaceModel:
    """The folder, ready for trials."""
    return HuggingFaceModel(folder, HuggingFaceOptions(device, dtype, (), pattern))
