"""ONNX Runtime's CPU provider: the operator everywhere, which there handles padding and batches."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._target import Target

TARGET: Final = Target(
    name="cpu",
    summary="ONNX Runtime on CPUs, TriangleAttention in every layer",
    lower=(),
    lower_dense_twin=(LowerDenseSitesPass,),
    left_padding=True,
)
