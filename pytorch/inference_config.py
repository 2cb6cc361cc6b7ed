"""`TriangleMixInferenceConfig`: the reference card's presets, with its numbers converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.config import TriangleMixConfig

NPU_BLOCK_SIZES: Final = (64, 128)
"""Smallest and largest block that the card advises for Ascend, in tokens."""

# The card's own numbers (its quick reference and README; its code has 10 and 12 layers instead).
_CARD_PATTERN: Final = TrianglePattern.from_reference_card(4, 32, 64)
_CARD_LONG_PATTERN: Final = TrianglePattern.from_reference_card(8, 64, 128)
_CARD_LAYERS: Final = {"14B": 12, "32B": 16}
_CARD_NPU_LAYERS: Final = 12
_CARD_LONG_LAYERS: Final = 16


@dataclass(frozen=True)
class TriangleMixInferenceConfig:
    """What a deployment sets: the pattern, the layers, and the block size on an Ascend NPU.

    The three numbers have the operator's meaning here as everywhere in this package. The `for_...`
    presets reproduce the reference card's *masks* exactly, so its 4 / 32 / 64 read 5 / 33 / 63. The
    card takes the first layers; here `num_triangle_layers` means the deepest, because the first
    ones are what accuracy rests on. None of the card's presets has been measured: they are
    starting points for `trianglemix-analyze`. `block_sparse_layer_indices` and `block_rule` are
    `TriangleMixConfig`'s; no preset names any.

    Raises:
        ConfigurationError: a value out of range.
    """

    enable_trianglemix: bool = True
    num_triangle_layers: int | None = None
    triangle_layer_indices: Sequence[int] | None = None
    starting_layer: int | None = None
    num_sink_tokens: int = TrianglePattern.num_sink_tokens
    sliding_window_size: int = TrianglePattern.sliding_window_size
    num_last_tokens: int = TrianglePattern.num_last_tokens
    use_npu_optimization: bool = False
    npu_block_size: int = NPU_BLOCK_SIZES[0]
    block_sparse_layer_indices: Sequence[int] = ()
    block_rule: BlockRule = field(default_factory=BlockRule)

    def __post_init__(self) -> None:
        check_npu_block_size(self.npu_block_size)
        _ = self._config()  # checks the rest

    def to_trianglemix_config(self) -> TriangleMixConfig | None:
        """The pattern and its layers, or None when TriangleMix is switched off."""
        return self._config() if self.enable_trianglemix else None

    def _config(self) -> TriangleMixConfig:
        return TriangleMixConfig(
            self.num_sink_tokens,
            self.sliding_window_size,
            self.num_last_tokens,
            self.num_triangle_layers,
            self.triangle_layer_indices,
            self.starting_layer,
            self.block_sparse_layer_indices,
            self.block_rule,
        )

    @classmethod
    def for_qwen3(
        cls, model_size: str = "14B", num_triangle_layers: int | None = None
    ) -> TriangleMixInferenceConfig:
        """The card's preset for Qwen3-14B or Qwen3-32B (12 and 16 layers, unmeasured).

        Raises:
            ConfigurationError: a size the card has no preset for.
        """
        if model_size not in _CARD_LAYERS:
            raise ConfigurationError(
                f"model_size is {model_size!r}, but the card has presets for "
                f"{' and '.join(_CARD_LAYERS)} only; use trianglemix-analyze for other models"
            )
        layers = _CARD_LAYERS[model_size] if num_triangle_layers is None else num_triangle_layers
        return cls._preset(_CARD_PATTERN, layers)

    @classmethod
    def for_long_sequence(cls) -> TriangleMixInferenceConfig:
        """The card's preset for prompts of more than 4K tokens (16 layers, unmeasured)."""
        return cls._preset(_CARD_LONG_PATTERN, _CARD_LONG_LAYERS)

    @classmethod
    def for_ascend_npu(
        cls, num_triangle_layers: int = _CARD_NPU_LAYERS
    ) -> TriangleMixInferenceConfig:
        """The card's preset for Ascend NPUs (12 layers, blocks of 64 tokens, unmeasured)."""
        return cls._preset(_CARD_PATTERN, num_triangle_layers)

    @classmethod
    def _preset(cls, pattern: TrianglePattern, layers: int) -> TriangleMixInferenceConfig:
        return cls(
            num_triangle_layers=layers,
            num_sink_tokens=pattern.num_sink_tokens,
            sliding_window_size=pattern.sliding_window_size,
            num_last_tokens=pattern.num_last_tokens,
            use_npu_optimization=True,
        )


def check_npu_block_size(block_size: int) -> None:
    """Raises ConfigurationError unless `block_size` is from 64 to 128 tokens, by 16."""
    smallest, largest = NPU_BLOCK_SIZES
    if not smallest <= block_size <= largest or block_size % 16:
        raise ConfigurationError(
            f"the NPU block size is {block_size}, but must be a multiple of 16 "
            f"from {smallest} to {largest}"
        )
