"""ONNX Runtime's CUDA provider on H100 and H200: the operator everywhere, the fastest there is."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._onnx_runtime import CUDA, OnnxRuntimeTarget


class _Hopper(OnnxRuntimeTarget):
    name = "hopper"
    summary = "ONNX Runtime on H100 and H200, our operators in every layer"
    provider = CUDA
    left_padding = True
    rotates_inside = True
    lower_dense = (LowerDenseSitesPass,)


TARGET: Final = _Hopper()
