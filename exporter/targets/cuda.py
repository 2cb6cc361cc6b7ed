"""ONNX Runtime's CUDA provider, any GPU: dense layers run on GroupQueryAttention."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._onnx_runtime import CUDA, OnnxRuntimeTarget


class _Cuda(OnnxRuntimeTarget):
    name = "cuda"
    summary = "ONNX Runtime on NVIDIA GPUs, GroupQueryAttention in dense layers"
    provider = CUDA
    rotates_inside = True
    lower = lower_dense = (LowerDenseSitesPass,)


TARGET: Final = _Cuda()
