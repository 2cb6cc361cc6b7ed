"""ONNX Runtime's CUDA provider on H100 and H200: the operator everywhere, the fastest there is."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.rewrite.fold_rotation import FoldRotationPass
from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._target import CUDA, Target

TARGET: Final = Target(
    name="hopper",
    summary="ONNX Runtime on H100 and H200, TriangleAttention in every layer",
    lower=(FoldRotationPass,),
    lower_dense_twin=(FoldRotationPass, LowerDenseSitesPass),
    left_padding=True,
    provider=CUDA,
)
