"""ONNX Runtime's CUDA provider, any GPU: dense layers run on GroupQueryAttention."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.rewrite.fold_rotation import FoldRotationPass
from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._target import CUDA, Target

TARGET: Final = Target(
    name="cuda",
    summary="ONNX Runtime on NVIDIA GPUs, GroupQueryAttention in dense layers",
    lower=(FoldRotationPass, LowerDenseSitesPass),
    lower_dense_twin=(FoldRotationPass, LowerDenseSitesPass),
    left_padding=False,
    provider=CUDA,
)
