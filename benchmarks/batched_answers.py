"""Greedy answers of a transformers model: prompts are read one by one, answers written together.

Decode steps are dense under every plan, and they are most of the time of a short answer: the caches
of several prompts, padded on the left, are decoded as one batch by the model's own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Prefill = Callable[[Tensor], Any]
"""`ids [1, N]` -> the model's output, with its cache and the last row's logits."""


@dataclass(frozen=True)
class _Read:
    """A prompt that was read: its cache, and the answer's first token."""

    keys: list[Tensor]  # [1, G, N, D], a layer each
    values: list[Tensor]
    token: int

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]


def read_prompt(model: Any, ids: Sequence[int]) -> _Read:
    """Prefills one prompt under the model's present attention."""
    tensor = torch.tensor([ids], device=model.device)
    output = model(tensor, use_cache=True, logits_to_keep=1)
    layers = output.past_key_values.layers
    token = int(output.logits[0, -1].argmax())
    return _Read([x.keys for x in layers], [x.values for x in layers], token)


def write_answers(
    model: Any, prompts: Sequence[_Read], max_new_tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    """Up to `max_new_tokens` tokens of each answer, its stop token left out."""
    from transformers import DynamicCache

    longest = max(prompt.length for prompt in prompts)
    pads = torch.tensor([longest - prompt.length for prompt in prompts], device=model.device)
    cache = DynamicCache()
    for layer in range(len(prompts[0].keys)):
        keys, values = (
            torch.cat([_padded(x, longest) for x in parts])
            for parts in ([p.keys[layer] for p in prompts], [p.values[layer] for p in prompts])
        )
        cache.update(keys, values, layer)
    tokens = torch.tensor([[prompt.token] for prompt in prompts], device=model.device)
    written = [tokens]
    stop = torch.tensor(sorted(stops), device=model.device)
    done = torch.isin(tokens[:, 0], stop)
    for step in range(max_new_tokens - 1):
        if bool(done.all()):
            break
        position = longest + step
        mask = torch.arange(position + 1, device=model.device) >= pads[:, None]
        output = model(
            tokens,
            attention_mask=mask.long(),
            position_ids=(position - pads)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        tokens = output.logits[:, -1:].argmax(-1)
        written.append(tokens)
        done |= torch.isin(tokens[:, 0], stop)
    return [_until(row, stops) for row in torch.cat(written, 1).tolist()]


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0))


def _until(tokens: list[int], stops: frozenset[int]) -> list[int]:
    end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
