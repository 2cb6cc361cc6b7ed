"""vLLM's FlashAttention backend with triangle and block-sparse layers (CUDA, FlashAttention 3)."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.pytorch.cuda_backend import HOPPER_HEAD_SIZES, why_not_device, why_not_heads
from trianglemix.vllm.backend import Step, TriangleBuilding, TriangleForward
from trianglemix.vllm.engine_config import configuration
from trianglemix.vllm.gathered_past import gather_past
from trianglemix.vllm.paged import FlashCalls, PagedKeys, stream_paged
from trianglemix.vllm.paged_blocks import PagedBlocks, reads_pages
from trianglemix.vllm.refusals import FLASH_ATTENTION
from trianglemix.vllm.roles import BLOCK_SPARSE
from trianglemix.vllm.sparse_segments import SegmentKernel
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

_LOGGER: Final = logging.getLogger("vllm.trianglemix")


class TriangleFlashBuilder(TriangleBuilding, FlashAttentionMetadataBuilder):
    """Splits the steps; a step that may hold rows of a prompt is never a whole CUDA graph."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        page, head_size = kv_cache_spec.block_size, kv_cache_spec.head_size
        sparse = any(layer.role == BLOCK_SPARSE for layer in self._layers)
        if sparse and head_size in HOPPER_HEAD_SIZES and not reads_pages(page, head_size):
            _LOGGER.warning(
                "block-sparse layers copy keys out of pages of %d tokens, which takes longer than "
                "to read larger ones in place; serve with --block-size 128",
                page,
            )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """vLLM's interface. A graph would replay one split for every step."""
        if configuration(vllm_config) is not None:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)


class TriangleFlashImpl(TriangleForward, FlashAttentionImpl):
    """Streaming rows by two calls over the page table, rows of sparse tiles by our own kernels.

    Everything else is vLLM's.
    """

    def stream(self, query: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """See `TriangleForward.stream`."""
        assert isinstance(step.keeps, TrianglePattern)
        settings = {
            "softmax_scale": self.scale,
            "softcap": self.logits_soft_cap,
            "fa_version": self.vllm_flash_attn_version,
            "num_splits": 1 if self.batch_invariant_enabled else 0,
        }
        calls = FlashCalls(flash_attn.flash_attn_varlen_func, merge_attn_states, settings)
        both = kv_cache.transpose(1, 2)
        key, value = both[..., : self.head_size], both[..., self.head_size :]
        fixed = flash_attn.canonicalize_singleton_dim_strides
        keys = PagedKeys(fixed(key), fixed(value))
        stream_paged(query, keys, step.ours, step.sinks, step.keeps, calls, output)

    def sparse_kernel(self, kv_cache: Tensor, attention: BlockSparse) -> SegmentKernel:
        """See `TriangleForward.sparse_kernel`."""
        in_pages = PagedBlocks(kv_cache, attention)
        return in_pages if in_pages.is_taken else super().sparse_kernel(kv_cache, attention)

    def gather(self, kv_cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `TriangleForward.gather`."""
        return gather_past(kv_cache, table, tokens)

    def refusal(self, role: str, kv_cache_spec: Any) -> str | None:
        """See `TriangleForward.refusal`."""
        version = self.vllm_flash_attn_version
        if version != FLASH_ATTENTION:
            return (
                f"vLLM runs it by FlashAttention {version}, and the plug-in was run with "
                f"{FLASH_ATTENTION} only (an H100 or H200 has it)"
            )
        if role == BLOCK_SPARSE:
            return why_not_heads(kv_cache_spec.dtype, self.head_size) or why_not_device(
                torch.cuda.current_device()
            )
        return None


class TriangleFlashBackend(FlashAttentionBackend):
    """vLLM's own backend, unless the engine being made is configured for TriangleMix."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """vLLM's interface."""
        configured = configuration(get_current_vllm_config_or_none()) is not None
        return TriangleFlashImpl if configured else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """vLLM's interface."""
        return TriangleFlashBuilder
