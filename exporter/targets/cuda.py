"""ONNX Runtime's CUDA provider: dense layers run on GroupQueryAttention, the best there is."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.fold_rotation import FoldRotationPass
from trianglemix.exporter.target import Target
from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass

TARGET: Final = Target(
    name="cuda",
    summary="TriangleAttention in triangle layers, GroupQueryAttention in dense ones",
    lower=(FoldRotationPass, LowerDenseSitesPass),
    lower_dense_twin=(FoldRotationPass, LowerDenseSitesPass),
    left_padding=False,
)
