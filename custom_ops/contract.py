"""The operator's contract, written once: name, domain, inputs, outputs, attributes, defaults.

Everything that builds, reads or checks a `TriangleAttention` node takes its names from here; the
native side mirrors them in `src/problem.h` and `src/op.cc`, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from trianglemix.custom_ops.errors import ConfigurationError

DOMAIN: Final = "trianglemix"
OP_TYPE: Final = "TriangleAttention"
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
ATTRIBUTES: Final = (
    ATTR_NUM_HEADS,
    ATTR_KV_NUM_HEADS,
    ATTR_SCALE,
    ATTR_SOFTCAP,
    ATTR_SINK,
    ATTR_WINDOW,
    ATTR_LAST,
)
"""Those of every node, and of the function body, which has no defaults for them.

Elsewhere `scale` is 0 (`1/sqrt(D)`), `softcap` 0 (none), and the pattern `TrianglePattern()`.
"""

DENSE_WINDOW: Final = -1
"""`sliding_window_size` of the dense mode: every row keeps all keys behind itself."""
MAX_HEAD_SIZE: Final = 256
HEAD_SIZE_STEP: Final = 8


@dataclass(frozen=True)
class TrianglePattern:
    """Which keys a row keeps: sinks, a sliding window, dense last rows (all in tokens).

    `keep(i, j) = j <= i and (j < num_sink_tokens or i - j < sliding_window_size or
    i >= N - num_last_tokens)`. `sliding_window_size == -1` keeps everything (dense mode).

    Raises:
        ConfigurationError: a value is out of its range; the message holds name and value.
    """

    num_sink_tokens: int = 8
    sliding_window_size: int = 512
    num_last_tokens: int = 128

    def __post_init__(self) -> None:
        if self.num_sink_tokens < 0:
            raise ConfigurationError(
                f"{ATTR_SINK} is {self.num_sink_tokens}, but must be 0 or more"
            )
        if self.sliding_window_size < 1 and self.sliding_window_size != DENSE_WINDOW:
            raise ConfigurationError(
                f"{ATTR_WINDOW} is {self.sliding_window_size}, but must be 1 or more, "
                f"or {DENSE_WINDOW} to keep every key"
            )
        if self.num_last_tokens < 1:
            raise ConfigurationError(
                f"{ATTR_LAST} is {self.num_last_tokens}, but must be 1 or more"
            )

    @property
    def is_dense(self) -> bool:
        """True for the dense mode, which drops nothing at any length."""
        return self.sliding_window_size == DENSE_WINDOW

    @property
    def exact_length(self) -> int | None:
        """Longest prompt (tokens) of which nothing is dropped; None in dense mode (no limit)."""
        if self.is_dense:
            return None
        return self.num_sink_tokens + self.sliding_window_size + self.num_last_tokens

    def as_attributes(self) -> dict[str, int]:
        """The three pattern attributes of a node, by ONNX name."""
        return asdict(self)

    # Other people's spellings of the same pattern (proved against the predicate in the tests).

    @classmethod
    def from_minference(cls, n_init: int, n_local: int, n_last: int) -> TrianglePattern:
        """The values of microsoft/MInference's code, `attn_type="tri_mix"`: the same meaning."""
        return cls(n_init, n_local, n_last)

    @classmethod
    def from_paper(cls, si: int, sl: int, last: int) -> TrianglePattern:
        """The paper's 1-based formulas `j <= si`, `i - j <= sl`, `N - i < last`."""
        return cls(si, sl + 1, last)

    @classmethod
    def from_reference_card(cls, si: int, sl: int, last: int) -> TrianglePattern:
        """The paper's formulas read with 0-based indices, as the reference card does."""
        return cls(si + 1, sl + 1, last - 1)

    @classmethod
    def from_vllm_ascend(cls, sink: int, window: int, tail: int) -> TrianglePattern:
        """vllm-ascend's fused operator, whose window leaves the row itself out of its count."""
        return cls(sink, window + 1, tail)


DENSE_PATTERN: Final = TrianglePattern(
    num_sink_tokens=0, sliding_window_size=DENSE_WINDOW, num_last_tokens=1
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
