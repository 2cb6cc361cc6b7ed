"""Attention over the blocks that each head keeps; rows of dense tiles go the way of dense layers.

A CUDA device runs the library's kernels, which choose the blocks themselves, or else compiled
flex_attention; a CPU masked SDPA by groups of tiles. No `S x T` of all heads is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import TILE
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.pytorch.backends import flex_takes, triangle_attention
from trianglemix.pytorch.block_choice import (
    BlockSparse,
    TileSpan,
    by_the_rule,
    current_chooser,
    sparse_spans,
)
from trianglemix.pytorch.blocks import Attention, sdpa_block
from trianglemix.pytorch.cuda_backend import kernel_blocks, why_not_kernels
from trianglemix.pytorch.flex import flex_span
from trianglemix.pytorch.layout import Rows

PAIRS: Final = 2**26
"""Pairs of a query and a key whose mask is held at a time: 64 MB."""

SpanKernel = Callable[[Tensor, Tensor, Tensor, Tensor, TileSpan, BlockSparse], Tensor]
"""`query [B, H, R, D]` of a span's rows, `key [B, G, K, D]` and `value [B, G, K, Dv]` of its keys,
which blocks each tile keeps, bool `[B, H, tiles, blocks]` -> `[B, H, R, Dv]`."""


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: BlockSparse, layer: int = 0
) -> Tensor:
    """`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`.

    `T` is the end of the call's rows. `layer` is what a chooser of `choosing_blocks` is told.

    Raises:
        ConfigurationError: a device that no kernel is for.
    """
    spans = sparse_spans(rows, query.shape[2], attention.rule)
    if all(span.is_empty for span, _ in spans):
        return _dense(query, key, value, rows, attention)
    chooser = current_chooser()
    if chooser is by_the_rule and why_not_kernels(query, key, value) is None:
        return kernel_blocks(query, key, value, rows, attention)
    kernel = _kernel_of(query)
    blocks = chooser(layer, query, key, rows, attention)
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for span, batch in spans:
        tensors = query[batch], key[batch], value[batch]
        dense = [slice(0, query.shape[2])]
        if not span.is_empty:
            at, keys = span.rows, span.keys
            kept = blocks[batch][:, :, span.begin : span.end, : span.end]
            q, k, v = tensors
            output[batch, :, at] = kernel(
                q[:, :, at], k[:, :, keys], v[:, :, keys], kept, span, attention
            )
            dense = [slice(0, at.start), slice(at.stop, query.shape[2])]
        for part in dense:
            if part.start < part.stop:
                output[batch, :, part] = _dense_part(tensors, span, part, attention)
    return output


def _kernel_of(query: Tensor) -> SpanKernel:
    device = query.device.type
    if device not in SPAN_KERNELS:
        raise ConfigurationError(
            f"the model is on {device!r}, but block-sparse layers run in PyTorch on "
            f"{' and '.join(SPAN_KERNELS)} only; move the model there, or name no block-sparse "
            "layers"
        )
    return SPAN_KERNELS[device]


def _dense(query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: BlockSparse) -> Tensor:
    dense = Attention(DENSE_PATTERN, attention.scale, attention.softcap)
    return triangle_attention(query, key, value, rows, dense)


def _dense_part(
    tensors: tuple[Tensor, Tensor, Tensor], span: TileSpan, part: slice, attention: BlockSparse
) -> Tensor:
    """The call's rows `part`, which keep every key."""
    query, key, value = tensors
    B, end = query.shape[0], span.start + part.stop
    rows = Rows(span.start + part.start, (span.first_valid,) * B, (span.prompt_length,) * B)
    return _dense(query[:, :, part], key[:, :, :end], value[:, :, :end], rows, attention)


def masked_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    span: TileSpan,
    attention: BlockSparse,
) -> Tensor:
    """`SpanKernel` by masked SDPA; the query heads of a group are packed into the rows."""
    B, H, _, D = query.shape
    G = key.shape[1]
    dense = Attention(DENSE_PATTERN, attention.scale, attention.softcap)
    output = []
    for piece in span.pieces(max(1, PAIRS // (B * H * TILE * TILE * span.end))):
        first, keys = TILE * (piece.begin - span.begin), piece.keys.stop - piece.keys.start
        rows = query[:, :, first : first + TILE * (piece.end - piece.begin)]
        R = rows.shape[2]
        tiles = slice(piece.begin - span.begin, piece.end - span.begin)
        mask = _row_mask(kept[:, :, tiles], piece, R, keys)
        result = sdpa_block(
            rows.reshape(B, G, H // G * R, D),
            key[:, :, :keys],
            value[:, :, :keys],
            mask.view(B, G, H // G * R, keys),
            dense,
        )
        output.append(result.reshape(B, H, R, value.shape[3]))
    return output[0] if len(output) == 1 else torch.cat(output, 2)


def _row_mask(kept: Tensor, piece: TileSpan, rows: int, keys: int) -> Tensor:
    """`[B, H, rows, keys]`: `kept [B, H, tiles, blocks]` for each row and key, and causal."""
    by_key = kept.repeat_interleave(TILE, 3)[..., :keys]
    by_row = by_key.repeat_interleave(TILE, 2)[:, :, :rows]
    row = TILE * piece.begin + torch.arange(rows, device=kept.device)[:, None]
    return by_row & (torch.arange(keys, device=kept.device) <= row)


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    span: TileSpan,
    attention: BlockSparse,
) -> Tensor:
    run = flex_span if flex_takes(query, value) else masked_span
    return run(query, key, value, kept, span, attention)


SPAN_KERNELS: Final[dict[str, SpanKernel]] = {"cpu": masked_span, "cuda": _cuda}
"""By device type; other devices are refused."""
