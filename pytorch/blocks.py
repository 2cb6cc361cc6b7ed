"""The operator in O(N) memory on any device: one SDPA call for each block of query rows.

A block of rows that are not last rows sees the sinks and the keys from its first row's window on;
a block of last rows sees every key before its end. The query heads that share a key/value head are
packed into the rows, so that K and V are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import key_intervals
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.masks import keep

BLOCK: Final = 256
"""Query rows of a block. Smaller ones visit fewer dropped keys, larger ones launch less."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention: its pattern, `scale` of the scores, `softcap` (0 = none)."""

    pattern: TrianglePattern
    scale: float
    softcap: float = 0.0


BlockKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Attention], Tensor]
"""Dense attention of one block: `[B, G, R, D]`, `[B, G, K, D]`, `[B, G, K, Dv]`, bool mask
`[R, K]` (True = kept; None = all) -> `[B, G, R, Dv]`."""


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention
) -> Tensor:
    """`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`.

    Rows before their row's first real token are zero.
    """
    return BlockRunner(sdpa_block)(query, key, value, rows, attention)


def sdpa_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """A block by SDPA, or, with softcap, which SDPA has not, by its scores in float32."""
    if not attention.softcap:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attention.scale
        )
    scores = query.float() @ key.float().transpose(2, 3) * attention.scale
    scores = attention.softcap * torch.tanh(scores / attention.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).to(value.dtype) @ value


@dataclass(frozen=True)
class BlockRunner:
    """`block_attention` with another kernel for the blocks."""

    kernel: BlockKernel

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention
    ) -> Tensor:
        """As `block_attention`."""
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        groups = rows.groups()
        for (first_valid, prompt_length), members in groups.items():
            span = _Span(rows.start, query.shape[2], first_valid, prompt_length)
            batch = slice(None) if len(groups) == 1 else members
            q, k, v = query[batch], key[batch], value[batch]
            for block in _blocks(span, attention.pattern):
                piece = slice(block.begin - rows.start, block.end - rows.start)
                output[batch, :, piece] = self._attend(q, k, v, block, span, attention)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block: _Block,
        span: _Span,
        attention: Attention,
    ) -> Tensor:
        B, H, _, D = query.shape
        G, R = key.shape[1], block.end - block.begin
        rows = query[:, :, block.begin - span.start : block.end - span.start]
        packed = rows.reshape(B, G, H // G * R, D)  # row h * R + s is query head h of the group
        k, v = (_pick(x, block.keys) for x in (key, value))
        mask = _mask(block, span, attention.pattern, query.device)
        mask = None if mask is None else mask.repeat(H // G, 1)
        result = self.kernel(packed, k, v, mask, attention)
        return result.reshape(B, H, R, value.shape[3])


@dataclass(frozen=True)
class _Span:
    """Rows `[start, start + length)` of prompts that begin and end at the same positions."""

    start: int
    length: int
    first_valid: int
    prompt_length: int


@dataclass(frozen=True)
class _Block:
    """Rows `[begin, end)` and the key slots they may keep, as ascending half-open ranges."""

    begin: int
    end: int
    keys: tuple[tuple[int, int], ...]


def _blocks(span: _Span, pattern: TrianglePattern) -> Iterator[_Block]:
    begin, stop = max(span.start, span.first_valid), span.start + span.length
    first_last_row = max(begin, min(stop, span.prompt_length - pattern.num_last_tokens))
    while begin < stop:
        streaming = begin < first_last_row
        end = min(begin + BLOCK, first_last_row if streaming else stop)
        limits = pattern, span.prompt_length, span.first_valid
        yield _Block(begin, end, tuple(key_intervals(begin, end - 1, *limits)))
        begin = end


def _pick(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    pieces = [x[:, :, begin:end] for begin, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _mask(
    block: _Block, span: _Span, pattern: TrianglePattern, device: torch.device
) -> Tensor | None:
    """`[R, keys]`; None for a single row that keeps every key of its ranges (decoding)."""
    if block.end - block.begin == 1:
        return None
    row = torch.arange(block.begin, block.end, device=device)
    column = torch.cat([torch.arange(begin, end, device=device) for begin, end in block.keys])
    return keep(row[:, None], column[None, :], pattern, span.prompt_length, span.first_valid)
