"""Attention with a theta of ones on its weights, whose gradient is summed by section.

The weights of one layer, shared by its heads, are multiplied by `theta = ones[N, N]`. The gradient
`d y / d theta` is never held: the backward pass recomputes the weights for a chunk of rows, lets
torch differentiate that chunk, and adds its theta gradient up by section. So one ordinary backward
pass of the model gives the sums of all layers, in memory that grows with `N`, not with `N^2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.masks import keep

DEFAULT_CHUNK: Final = 128
"""Rows whose weights are held at a time."""


@dataclass(frozen=True)
class ProbeSettings:
    """The pattern whose sections are told apart, and one layer's scale, softcap and own window.

    `window` is the layer's own sliding window (None = it sees everything).
    """

    pattern: TrianglePattern
    scale: float
    softcap: float = 0.0
    window: int | None = None
    chunk: int = DEFAULT_CHUNK


def probed_attention(
    query: Tensor, key: Tensor, value: Tensor, settings: ProbeSettings, sums: Tensor
) -> Tensor:
    """Causal attention of a whole prompt: `[1, H, N, D]`, `[1, G, N, D]` -> `[1, H, N, Dv]`.

    During the backward pass `sums`, `[3, 3]` float64 on the CPU, grows by (row by row of
    `SECTIONS`) the sum of the theta gradient, the sum of its absolute value, and the pairs counted.
    """
    result: Tensor = _Probed.apply(query, key, value, settings, sums)  # type: ignore[no-untyped-call]
    return result


class _Probed(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: ProbeSettings,
        sums: Tensor,
    ) -> Tensor:
        context.save_for_backward(query, key, value)
        context.settings, context.sums = settings, sums
        pieces = []
        for rows in _chunks(query.shape[2], settings.chunk):
            q, k, v = query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop]
            pieces.append(_attend(q, k, v, None, rows, settings))
        return torch.cat(pieces, dim=2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = context.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for rows in _chunks(query.shape[2], context.settings.chunk):
            chunk = (query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop])
            parts = _chunk_gradients(chunk, gradients[0][:, :, rows], rows, context.settings)
            grad_query[:, :, rows] = parts[0]
            grad_key[:, :, : rows.stop] += parts[1]
            grad_value[:, :, : rows.stop] += parts[2]
            context.sums += _section_sums(parts[3], rows, query.shape[2], context.settings)
        return grad_query, grad_key, grad_value, None, None


def _chunk_gradients(
    chunk: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    rows: slice,
    settings: ProbeSettings,
) -> tuple[Tensor, ...]:
    """Gradients of a chunk's query, key, value and theta (`[R, keys]`)."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in chunk)
        size, dtype = (q.shape[2], k.shape[2]), _precise(q.dtype)
        theta = torch.ones(size, dtype=dtype, device=q.device, requires_grad=True)
        output = _attend(q, k, v, theta, rows, settings)
        return torch.autograd.grad(output, (q, k, v, theta), gradient)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor | None,
    rows: slice,
    settings: ProbeSettings,
) -> Tensor:
    B, H, R, D = query.shape
    G = key.shape[1]
    grouped = query.reshape(B, G, H // G, R, D)
    scores = grouped @ key[:, :, None].transpose(3, 4)
    scores = scores.to(_precise(scores.dtype)) * settings.scale
    if settings.softcap:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    row, column = _positions(rows, query.device)
    seen = column <= row
    if settings.window:
        seen = seen & (row - column < settings.window)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    if theta is not None:
        weights = weights * theta
    output = weights.to(value.dtype) @ value[:, :, None]
    return output.reshape(B, H, R, value.shape[3])


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _positions(rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return row, torch.arange(rows.stop, device=device)[None, :]


def _section_sums(theta: Tensor, rows: slice, length: int, settings: ProbeSettings) -> Tensor:
    """`[3, 3]`: for each section, the sum, the sum of absolute values, the number of pairs."""
    row, column = _positions(rows, theta.device)
    pattern = settings.pattern
    triangle = keep(row, column, pattern, length)
    streaming = keep(row, column, pattern, length + pattern.num_last_tokens)  # no last rows
    causal = column <= row
    sections = (streaming, causal & ~triangle, triangle & ~streaming)
    gradient = theta.double()
    totals = [
        torch.stack([(gradient * s).sum(), (gradient.abs() * s).sum(), s.sum().double()])
        for s in sections
    ]
    return torch.stack(totals).cpu()
