"""The operator on an Ascend NPU: blocks of rows by torch_npu's fused attention.

Imported only where torch_npu is installed (`backends.py` looks for it). With triton-ascend beside
it the op `torch.ops.trianglemix.triangle_attention.triton` is there too: our own kernel.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from trianglemix.pytorch.blocks import Attention, BlockRunner, sdpa_block
from trianglemix.pytorch.layout import Rows

if find_spec("triton") is not None:
    import_module("trianglemix.pytorch.npu_triton")


def npu_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention
) -> Tensor:
    """`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`."""
    return BlockRunner(_fused_block)(query, key, value, rows, attention)


def _fused_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """`npu_fusion_attention` masks where its mask is True: the opposite of SDPA's."""
    if attention.softcap:
        return sdpa_block(query, key, value, mask, attention)
    fused: Any = import_module("torch_npu").npu_fusion_attention
    result: Tensor = fused(
        query,
        key,
        value,
        query.shape[1],
        "BNSD",
        atten_mask=None if mask is None else ~mask,
        scale=attention.scale,
        sparse_mode=0,
    )[0]
    return result
