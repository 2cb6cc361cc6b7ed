"""What all operators share, written once: domain, inputs, outputs, attributes, head layout.

Everything that builds, reads or checks a node takes its names from here; the native side mirrors
them in `src/binding/attention.h`, and a test compares the two. What is one operator's own is in its
folder's `contract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from trianglemix.custom_ops.errors import ConfigurationError

DOMAIN: Final = "trianglemix"
OP_VERSION: Final = 1
FUNCTION_OPSET: Final = 17
"""Opset of the model-local function: the oldest that can say it, so that it fits every model."""

INPUTS: Final = (
    "query",  # [B, S, H*D]
    "key",  # [B, S, G*D], new tokens only
    "value",  # [B, S, G*Dv], new tokens only
    "past_key",  # [B, G, P, D]
    "past_value",  # [B, G, P, Dv]
    "seqlens_k",  # [B] int32, end of the row's keys in the buffer, minus one
    "total_sequence_length",  # [] or [1] int32, host memory
    "prompt_length",  # [B] int32, N of the formula
    "first_valid",  # [B] int32, the row's first real key
)
"""In this order. Required: `query`, `seqlens_k`, `total_sequence_length`.

`key` and `value` are absent together, with packed queries; `past_key` and `past_value` together:
`P` is 0. An absent `prompt_length` is the end of the row's keys, an absent `first_valid` 0. The
whole reference is docs/operator.md.
"""
ROTARY_INPUTS: Final = (
    "cos_cache",  # [M, R/2], R <= D: how far the first R of each head turn at a position
    "sin_cache",  # [M, R/2]
)
"""Two more inputs, behind `INPUTS`, of a node that rotates queries and keys itself.

Both or none, of the queries' type. A new token's position is its slot in the cache;
`total_sequence_length` is at most `M`. Such a node may also take queries, keys and values as one:
`query` is `[B, S, (H+2G)*D]` and `key` and `value` are absent (this works without a rotation,
too). Both forms need `Dv = D`, and the library: the function body does not know them.
"""
OUTPUTS: Final = (
    "output",  # [B, S, H*Dv]
    "present_key",  # [B, G, T, D], T = max(P, total_sequence_length)
    "present_value",  # [B, G, T, Dv]
)
"""All required. Past and present may be one buffer, where both have as many slots."""

ATTR_NUM_HEADS: Final = "num_heads"
ATTR_KV_NUM_HEADS: Final = "kv_num_heads"
ATTR_SCALE: Final = "scale"
ATTR_SOFTCAP: Final = "softcap"
ATTR_SINK: Final = "num_sink_tokens"
ATTR_WINDOW: Final = "sliding_window_size"
ATTR_LAST: Final = "num_last_tokens"
ATTR_INTERLEAVED: Final = "rotary_interleaved"
"""Of `ROTARY_INPUTS`: 1 turns neighbours `(2i, 2i+1)`, 0 (the default) turns `(i, i + R/2)`."""
ATTRIBUTES: Final = (ATTR_NUM_HEADS, ATTR_KV_NUM_HEADS, ATTR_SCALE, ATTR_SOFTCAP)
"""Those of every node of every operator; where absent, `scale` is 0 (`1/sqrt(D)`), `softcap` 0."""

DENSE_WINDOW: Final = -1
"""`sliding_window_size` of the dense mode: every row keeps all keys behind itself."""
MAX_HEAD_SIZE: Final = 256
HEAD_SIZE_STEP: Final = 8
LARGEST: Final = 2**63 - 1
"""The largest number that an attribute can hold."""


def check_count(name: str, value: int, least: int) -> None:
    """An attribute that counts tokens: a plan's file may hold anything.

    Raises:
        ConfigurationError: no whole number, or one that is out of the attribute's range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigurationError(f"{name} is {value!r}, but must be a whole number")
    if value < least:
        raise ConfigurationError(f"{name} is {value}, but must be {least} or more")
    if value > LARGEST:
        raise ConfigurationError(f"{name} is {value}, but must be at most {LARGEST}")


def check_window(value: int) -> None:
    """`sliding_window_size`: one key or more, or the dense mode.

    Raises:
        ConfigurationError: it is neither.
    """
    check_count(ATTR_WINDOW, value, -LARGEST)
    if value < 1 and value != DENSE_WINDOW:
        raise ConfigurationError(
            f"{ATTR_WINDOW} is {value}, but must be 1 or more, or {DENSE_WINDOW} to keep every key"
        )


@dataclass(frozen=True)
class AttentionShape:
    """Head layout of one attention: `H` query heads, `G` key/value heads, head sizes `D`, `Dv`.

    Raises:
        ConfigurationError: a size the operator does not take.
    """

    num_heads: int
    kv_num_heads: int
    head_size: int
    value_head_size: int

    def __post_init__(self) -> None:
        if self.kv_num_heads < 1 or self.num_heads < 1 or self.num_heads % self.kv_num_heads:
            raise ConfigurationError(
                f"num_heads {self.num_heads} must be a positive multiple of "
                f"kv_num_heads {self.kv_num_heads}"
            )
        for name, size in (("head_size", self.head_size), ("value size", self.value_head_size)):
            if size % HEAD_SIZE_STEP or not HEAD_SIZE_STEP <= size <= MAX_HEAD_SIZE:
                raise ConfigurationError(
                    f"{name} is {size}, but must be a multiple of {HEAD_SIZE_STEP} "
                    f"from {HEAD_SIZE_STEP} to {MAX_HEAD_SIZE}"
                )
