"""What a cut window means, by transformers alone: the model's own function under another mask."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep

_NAME: Final = "families_reference"


@contextmanager
def cut_window(model: Any, layers: Sequence[int], pattern: TrianglePattern) -> Iterator[None]:
    """Inside it the model drops what `layers` drop, for whole prompts without pads."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        mask = attention_mask
        own = sys.modules[type(module).__module__].eager_attention_forward
        if module.layer_idx in layers:
            position = torch.arange(query.shape[2]).numpy()
            kept = keep(position[:, None], position[None, :], pattern, len(position))
            mask = mask.masked_fill(~torch.from_numpy(kept), torch.finfo(mask.dtype).min)
        result: tuple[Tensor, Any] = own(module, query, key, value, mask, **given)
        return result

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    previous = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits `[B, S, vocabulary]` of whole prompts, without a cache."""
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits.float()
    return result


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
