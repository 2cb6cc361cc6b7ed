"""The pattern as torch masks: of a whole prompt for pictures and tests, of a block for kernels."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.pytorch.config import TriangleMixConfig

MAX_WHOLE_MASK: Final = 32768
"""Longest prompt (tokens) whose whole `N x N` mask is built."""


def keep(
    row: Tensor,
    column: Tensor,
    pattern: TrianglePattern,
    prompt_length: Tensor | int,
    first_valid: Tensor | int = 0,
) -> Tensor:
    """`triangle.pattern.keep` in torch: which `column` each `row` keeps (int64, broadcast)."""
    sink = column - first_valid < pattern.num_sink_tokens
    kept = sink | (row >= prompt_length - pattern.num_last_tokens)
    if pattern.is_dense:
        kept = torch.ones_like(kept)
    else:
        kept = kept | (row - column < pattern.sliding_window_size)
    return kept & (column >= first_valid) & (column <= row)


def minus_infinity_floor(dtype: torch.dtype) -> float:
    """A finite stand-in for minus infinity: half of the dtype's lowest, so that sums stay finite.

    The card's -1e6 does not fit float16, whose lowest number is -65504.
    """
    return torch.finfo(dtype).min / 2


class TriangleMixMaskGenerator:
    """`[N, N]` masks of a prompt and of its sections (spec: Streaming, Last, Middle, Triangle).

    For pictures, tests and small experiments: a mask takes `N^2` numbers. `patch` and
    `AscendTriangleMixAttention` need none. `num_layers` is needed where the configuration counts
    layers from the deepest one.
    """

    def __init__(self, config: TriangleMixConfig, num_layers: int | None = None) -> None:
        self.config = config
        self.num_layers = num_layers

    def should_use_triangle(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` uses the pattern.

        Raises:
            ConfigurationError: the layers are counted from the deepest, but `num_layers` is
                unknown, or the layer is not one of the model's.
        """
        if self.num_layers is None and self.config.triangle_layer_indices is not None:
            return layer_idx in self.config.triangle_layer_indices
        if self.num_layers is None:
            raise ConfigurationError(
                "triangle layers are counted from the deepest one, but the number of layers is not "
                "known; pass TriangleMixMaskGenerator(config, num_layers=...)"
            )
        if not 0 <= layer_idx < self.num_layers:
            raise ConfigurationError(
                f"layer_idx is {layer_idx}, but the model has {self.num_layers} layers "
                f"(0-{self.num_layers - 1})"
            )
        return layer_idx in self.config.triangle_layers(self.num_layers)

    def get_attention_mask(
        self,
        seq_len: int,
        layer_idx: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        use_triangle: bool | None = None,
    ) -> Tensor:
        """`[N, N]` additive mask: 0 where a key is kept, minus infinity where it is not.

        `use_triangle` overrules the configuration's choice of layers; None follows it.

        Raises:
            ConfigurationError: a block-sparse layer, which has no mask before its queries and keys.
        """
        if use_triangle is None and layer_idx in self.config.block_sparse_layer_indices:
            raise ConfigurationError(
                f"layer {layer_idx} is a block-sparse layer, whose mask depends on queries and "
                "keys; trianglemix.pytorch.block_choice.choose_blocks makes it"
            )
        triangle = self.should_use_triangle(layer_idx) if use_triangle is None else use_triangle
        make = self.get_triangle_mask if triangle else self.get_dense_mask
        kept = make(seq_len, device, torch.bool)
        mask = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
        return mask.masked_fill_(~kept, float("-inf"))

    def get_triangle_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """`[N, N]`, 1 where a triangle layer keeps the key: Streaming and Last together."""
        return self._mask(seq_len, device, self.config.pattern).to(dtype)

    def get_dense_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """`[N, N]`, 1 for every causal key."""
        return self._mask(seq_len, device, DENSE_PATTERN).to(dtype)

    def get_streaming_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """`[N, N]`, 1 for sinks and the window."""
        return self._streaming(seq_len, device).to(dtype)

    def get_last_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """`[N, N]`, 1 for what only the dense last rows keep."""
        triangle = self.get_triangle_mask(seq_len, device)
        return (triangle & ~self._streaming(seq_len, device)).to(dtype)

    def get_middle_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """`[N, N]`, 1 for what a triangle layer drops."""
        dense = self.get_dense_mask(seq_len, device)
        return (dense & ~self.get_triangle_mask(seq_len, device)).to(dtype)

    def _streaming(self, seq_len: int, device: torch.device | str) -> Tensor:
        # Beyond the last row there are no dense rows: N is far behind the prompt's end.
        far = seq_len + self.config.num_last_tokens
        return self._mask(seq_len, device, self.config.pattern, far)

    def _mask(
        self,
        seq_len: int,
        device: torch.device | str,
        pattern: TrianglePattern,
        prompt_length: int | None = None,
    ) -> Tensor:
        if not 1 <= seq_len <= MAX_WHOLE_MASK:
            raise ConfigurationError(
                f"seq_len is {seq_len}, but a whole mask is built for 1 to {MAX_WHOLE_MASK} tokens "
                "only; for longer prompts use trianglemix.pytorch.patch, which needs no mask"
            )
        position = torch.arange(seq_len, device=device)
        return keep(position[:, None], position[None, :], pattern, prompt_length or seq_len)
