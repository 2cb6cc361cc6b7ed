"""The family's own model in float64, with the triangle's mask where a layer is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep

Array = NDArray[Any]
_NAME = "trianglemix_oracle"


@dataclass(frozen=True)
class Text:
    """A batch of token rows `[B, N]`, padded on the left; `pads [B]` says how far."""

    ids: Array
    pads: Array

    @property
    def mask(self) -> Array:
        """`[B, N]` int64, 1 = a real token."""
        return (np.arange(self.ids.shape[1])[None] >= self.pads[:, None]).astype(np.int64)

    @property
    def positions(self) -> Array:
        """`[B, N]` int64, counted from each row's first real token."""
        return np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)


@dataclass(frozen=True)
class Triangle:
    """The triangle layers and their pattern; `prompt_length` is `N` of the formula."""

    layers: frozenset[int]
    pattern: TrianglePattern
    prompt_length: int


class Oracle:
    """transformers' model of a folder, every token of a text in one pass without a cache."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "num_experts_per_tok"):  # the grouped product knows no float64
            config._experts_implementation = "eager"
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="eager"
        ).eval()

    def logits(self, text: Text, triangle: Triangle | None = None) -> Array:
        """`[B, N, vocabulary]` float64; rows of padding hold nothing of meaning."""
        with _attention(text, triangle), torch.no_grad():
            self._model.set_attn_implementation(_NAME)
            output = self._model(
                input_ids=torch.from_numpy(text.ids),
                position_ids=torch.from_numpy(text.positions),
                use_cache=False,
            )
        logits: Array = output.logits.double().numpy()
        return logits


@contextmanager
def _attention(text: Text, triangle: Triangle | None) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        del mask
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        scores = query.double() @ key.double().transpose(2, 3) * scale
        softcap = options.get("softcap")
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(text, triangle, module.layer_idx, options.get("sliding_window"))
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        return (weights @ value.double()).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register(_NAME, forward)
    AttentionMaskInterface.register(_NAME, lambda *arguments, **options: None)
    yield


def _visible(text: Text, triangle: Triangle | None, layer: int, window: int | None) -> torch.Tensor:
    """`[B, 1, N, N]`: which keys each row sees."""
    length = text.ids.shape[1]
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    pattern, end = DENSE_PATTERN, length
    if triangle is not None and layer in triangle.layers:
        pattern, end = triangle.pattern, triangle.prompt_length
    rows = [keep(i, j, pattern, end, int(first)) for first in text.pads]
    visible = np.stack(rows)[:, None]
    if window is not None:
        visible = visible & (i - j < window)
    return torch.from_numpy(visible)
