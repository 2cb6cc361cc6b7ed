"""The operator on an Ascend NPU as our own Triton kernel, and as a torch op.

Imported only where triton-ascend is installed. The op is
`torch.ops.trianglemix.triangle_attention.triton`; torch_npu's tensors dispatch to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trianglemix.custom_ops.ascend.triton_kernel import (
    EVERY_KEY,
    TILE,
    power_of_two,
    triangle_attention_kernel,
)
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.layout import Rows

_SCHEMA = (
    "triangle_attention.triton(Tensor query, Tensor key, Tensor value, Tensor first_valid, "
    "Tensor prompt_length, int start, float scale, float softcap, int num_sink_tokens, "
    "int sliding_window_size, int num_last_tokens) -> Tensor"
)
_NPU_DISPATCH_KEY = "PrivateUse1"


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    attention: Attention,
    tile: tuple[int, int] = TILE,
) -> Tensor:
    """`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`.

    Rows before their row's first real token are zero. `tile` (rows, keys): powers of two.
    """
    first_valid, prompt_length = (
        torch.tensor(values, dtype=torch.int32, device=query.device)
        for values in (rows.first_valid, rows.prompt_length)
    )
    lengths = first_valid, prompt_length
    return _run((query, key, value), lengths, rows.start, attention, tile)


def _run(
    tensors: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    start: int,
    attention: Attention,
    tile: tuple[int, int] = TILE,
) -> Tensor:
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in tensors)
    B, H, S, D = query.shape
    G, T, Dv = key.shape[1], key.shape[2], value.shape[3]
    output = torch.empty(B, H, S, Dv, dtype=query.dtype, device=query.device)
    pattern = attention.pattern
    window = EVERY_KEY if pattern.is_dense else pattern.sliding_window_size
    tile_rows = min(tile[0], power_of_two(S))
    grid = (-(-S // tile_rows), H, B)
    triangle_attention_kernel[grid](
        query, key, value, output, *lengths,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        start, S, T, H // G,
        pattern.num_sink_tokens, window, pattern.num_last_tokens,
        attention.scale, attention.softcap or 1.0,
        D=D, DV=Dv, WIDTH=power_of_two(D), VALUE_WIDTH=power_of_two(Dv),
        ROWS=tile_rows, KEYS=tile[1],
        HAS_SOFTCAP=attention.softcap > 0,
    )  # fmt: skip
    return output


def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_valid: Tensor,
    prompt_length: Tensor,
    start: int,
    scale: float,
    softcap: float,
    num_sink_tokens: int,
    sliding_window_size: int,
    num_last_tokens: int,
) -> Tensor:
    pattern = TrianglePattern(num_sink_tokens, sliding_window_size, num_last_tokens)
    attention = Attention(pattern, scale or query.shape[3] ** -0.5, softcap)
    return _run((query, key, value), (first_valid, prompt_length), start, attention)


def _op_shape(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_Library: Any = torch.library.Library  # untyped in torch
LIBRARY = _Library("trianglemix", "FRAGMENT")
LIBRARY.define(_SCHEMA)
LIBRARY.impl("triangle_attention.triton", _op, _NPU_DISPATCH_KEY)
LIBRARY.impl("triangle_attention.triton", _op_shape, "Meta")
