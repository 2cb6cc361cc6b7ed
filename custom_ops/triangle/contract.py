"""The operator's own contract: name, attributes, defaults. The rest is `custom_ops.contract`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

from trianglemix.custom_ops import contract
from trianglemix.custom_ops.strict import STRICT

OP_TYPE: Final = "TriangleAttention"
ATTRIBUTES: Final = (
    *contract.ATTRIBUTES,
    contract.ATTR_SINK,
    contract.ATTR_WINDOW,
    contract.ATTR_LAST,
)
"""Those of every node that we make, and of the function body, which has no defaults for them.

Elsewhere the pattern is `TrianglePattern()`.
"""


@dataclass(frozen=True)
class TrianglePattern:
    """Which keys a row keeps: sinks, a sliding window, dense last rows (all in tokens).

    `keep(i, j) = j <= i and (j < num_sink_tokens or i - j < sliding_window_size or
    i >= N - num_last_tokens)`. `sliding_window_size == -1` keeps everything (dense mode).

    Raises:
        ConfigurationError: a value is out of its range; the message holds name and value.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    num_sink_tokens: int = 8
    sliding_window_size: int = 512
    num_last_tokens: int = 128

    def __post_init__(self) -> None:
        contract.check_count(contract.ATTR_SINK, self.num_sink_tokens, 0)
        contract.check_count(contract.ATTR_LAST, self.num_last_tokens, 1)
        contract.check_window(self.sliding_window_size)

    @property
    def is_dense(self) -> bool:
        """True for the dense mode, which drops nothing at any length."""
        return self.sliding_window_size == contract.DENSE_WINDOW

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
    num_sink_tokens=0, sliding_window_size=contract.DENSE_WINDOW, num_last_tokens=1
)
