"""ONNX Runtime's CPU provider: the operator everywhere, which there handles padding and batches."""

from __future__ import annotations

from typing import Final

from trianglemix.exporter.options import Dtype, ExportOptions
from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._onnx_runtime import OnnxRuntimeTarget
from trianglemix.exporter.verify.session import CPU


class _Cpu(OnnxRuntimeTarget):
    name = "cpu"
    summary = "ONNX Runtime on CPUs, our operators in every layer"
    provider = CPU
    left_padding = True
    lower_dense = (LowerDenseSitesPass,)

    def weights_dtype(self, options: ExportOptions) -> Dtype:
        """The provider computes nothing in bfloat16."""
        return "float32"


TARGET: Final = _Cpu()
