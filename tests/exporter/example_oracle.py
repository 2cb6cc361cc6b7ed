"""The example decoder of the patterns in float64 NumPy, any layer with any rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse, block_sparse_attention
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.graph.attention_node import NEVER_LAST, Rule

Array = NDArray[Any]


def example_logits(
    example: Example,
    ids: Array,
    rules: Mapping[int, Rule],
    first_valid: Array | None = None,
    *,
    rotates: bool = False,
    windows: Mapping[int, int] | None = None,
    softcap: float = 0.0,
) -> Array:
    """`[B, N, vocabulary]` of a whole prompt in one call; `windows` of the layers that slide."""
    weights = {
        name.split("weight.", 1)[1]: value.const_value.numpy().astype(np.float64)
        for name, value in example.model.graph.initializers.items()
        if "weight." in name and value.const_value is not None
    }
    hidden = weights["embedding"][ids]
    for layer in range(example.num_layers):
        query, key, value = (hidden @ weights[f"{layer}.{part}"] for part in "qkv")
        if rotates:
            query = _rotated(query, example.shape.num_heads)
            key = _rotated(key, example.shape.kv_num_heads)
        window = (windows or {}).get(layer)
        rule = TrianglePattern(0, window, 1) if window else rules.get(layer, DENSE_PATTERN)
        never = np.full(len(ids), NEVER_LAST, np.int32) if window else None
        attention = (
            BlockSparse(example.shape, rule, softcap=softcap)
            if isinstance(rule, BlockRule)
            else Attention(example.shape, rule, softcap=softcap)
        )
        result = _attend(query, key, value, (first_valid, never), attention)
        hidden = hidden + result @ weights[f"{layer}.o"]
    return hidden @ weights["head"]


def _attend(
    query: Array,
    key: Array,
    value: Array,
    bounds: tuple[Array | None, Array | None],
    attention: Attention | BlockSparse,
) -> Array:
    """`bounds`: first_valid and prompt_length."""
    batch, length = query.shape[:2]
    shape = attention.shape
    call = Call(
        query,
        key,
        value,
        np.zeros((batch, shape.kv_num_heads, 0, shape.head_size)),
        np.zeros((batch, shape.kv_num_heads, 0, shape.value_head_size)),
        np.full(batch, length - 1, np.int32),
        length,
        first_valid=bounds[0],
        prompt_length=bounds[1],
    )
    if isinstance(attention, BlockSparse):
        return block_sparse_attention(call, attention)[0]
    return triangle_attention(call, attention)[0]


def _rotated(rows: Array, heads: int) -> Array:
    """The rotation of the example: angles `position * 10**-(4 * i / (D / 2))`, halves apart."""
    batch, length, width = rows.shape
    x = rows.reshape(batch, length, heads, width // heads)
    half = x.shape[-1] // 2
    angle = np.arange(length)[:, None] * 10.0 ** -np.arange(0, 4, 4 / half)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    first, second = x[..., :half], x[..., half:]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(rows.shape)
