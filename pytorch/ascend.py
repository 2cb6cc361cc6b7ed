"""The reference card's attention module and mask optimiser, for Ascend NPUs and anything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.pytorch.backends import triangle_attention
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.config import TriangleMixConfig
from trianglemix.pytorch.inference_config import NPU_BLOCK_SIZES, check_npu_block_size
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.masks import minus_infinity_floor


class AscendTriangleMixAttention(nn.Module):
    """Prefill attention of one layer: the pattern in O(N) memory and time, without a mask.

    It runs on any device; where torch_npu is installed NPU tensors go through its fused attention.
    A layer that is not one of the configuration's triangle layers is dense.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float | None = None,
        trianglemix_config: TriangleMixConfig | None = None,
        layer_idx: int | None = None,
        num_layers: int | None = None,
    ) -> None:
        """`scale` None means `1/sqrt(head_dim)`; `trianglemix_config` None means dense.

        Raises:
            ConfigurationError: a configuration without the layer's number and the model's count,
                or one that makes the layer block-sparse.
        """
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        pattern = DENSE_PATTERN
        if trianglemix_config is not None:
            if layer_idx is None or num_layers is None:
                raise ConfigurationError(
                    f"layer_idx is {layer_idx} and num_layers is {num_layers}, but a triangle "
                    "configuration needs both to know whether this layer is a triangle layer"
                )
            if layer_idx in trianglemix_config.block_sparse_layers(num_layers):
                raise ConfigurationError(
                    f"layer {layer_idx} is a block-sparse layer, which this module does not run; "
                    "use trianglemix.pytorch.patch on a CPU or on CUDA, or leave it out"
                )
            if layer_idx in trianglemix_config.triangle_layers(num_layers):
                pattern = trianglemix_config.pattern
        self.attention = Attention(pattern, head_dim**-0.5 if scale is None else scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query [B, N, H, D]`, `key` and `value` `[B, N, G, D]`, whole prompts -> `[B, N, H, D]`.

        Raises:
            ConfigurationError: another number of heads or head size, or lengths that differ.
        """
        B, N, H, D = query.shape
        G = key.shape[2]
        if (self.num_heads, self.head_dim) != (H, D) or H % G or key.shape[:2] != (B, N):
            raise ConfigurationError(
                f"query is {list(query.shape)} and key {list(key.shape)}, but this module takes "
                f"[B, N, {self.num_heads}, {self.head_dim}] and a key/value head count that "
                "divides the heads"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        rows = Rows(0, (0,) * B, (N,) * B)
        return triangle_attention(q, k, v, rows, self.attention).transpose(1, 2)


class AscendNPUTriangleMixOptimizer:
    """Makes an additive mask fit for an NPU, for code that must pass one."""

    def optimize_mask_for_npu(self, mask: Tensor, block_size: int = NPU_BLOCK_SIZES[0]) -> Tensor:
        """`[..., S, T]` mask (additive, or bool with True = kept) -> additive, finite, padded.

        Minus infinity becomes half of the dtype's lowest number (-1e6, as the card has it, does
        not fit float16), and both sizes are padded to whole blocks of `block_size` tokens (64 to
        128, by 16) with masked keys. Added rows mask everything: their results mean nothing.

        Raises:
            ConfigurationError: a block size out of range, or a mask of whole numbers.
        """
        check_npu_block_size(block_size)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        if not mask.is_floating_point():
            raise ConfigurationError(
                f"the mask is {mask.dtype}, but must be an additive float mask or a bool mask"
            )
        floor = minus_infinity_floor(mask.dtype)
        rows, columns = (-size % block_size for size in mask.shape[-2:])
        return nn.functional.pad(mask.clamp(min=floor), (0, columns, 0, rows), value=floor)
