"""Scores of a model with a choice of layers, on a task, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trianglemix.analysis.block_check import BlockKind
from trianglemix.custom_ops.block_sparse.contract import BlockRule
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


@dataclass(frozen=True)
class BlockTaskScorer:
    """Answers the same samples without the block-sparse layers, with them, and by chance."""

    model: HuggingFaceModel
    setup: Setup
    layers: tuple[Sequence[int], Sequence[int]]  # triangle, block-sparse
    progress: Callable[[str], None]

    def __call__(self, kind: BlockKind) -> list[float]:
        """Scores from 0 to 1, one a sample."""
        from trianglemix.analysis.random_blocks import RandomBlocks

        triangles, blocks = self.layers
        self.model.use_layers(triangles, () if kind == "none" else blocks)
        self.model.chooser = RandomBlocks(self.setup.first_seed) if kind == "random" else None
        name = "triangle layers" if kind == "none" else f"blocks by {kind}"
        return run_model(name, lambda: self.model, self.setup, self.progress).scores()


def open_model(
    folder: Path,
    device: str,
    dtype: str,
    pattern: TrianglePattern,
    rule: BlockRule | None = None,
) -> HuggingFaceModel:
    """The folder, ready for trials."""
    options = HuggingFaceOptions(device, dtype, (), pattern, (), rule or BlockRule())
    return HuggingFaceModel(folder, options)
