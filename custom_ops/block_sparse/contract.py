"""The operator's own contract: name, attributes, defaults. The rest is `custom_ops.contract`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

import numpy as np
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.strict import STRICT

OP_TYPE: Final = "BlockSparseAttention"
ATTR_MASS: Final = "mass"
ATTR_MIN_LENGTH: Final = "min_length"
ATTRIBUTES: Final = (
    *contract.ATTRIBUTES,
    ATTR_MASS,
    ATTR_MIN_LENGTH,
    contract.ATTR_SINK,
    contract.ATTR_WINDOW,
    contract.ATTR_LAST,
)
"""Those of every node that we make, and of the function body, which has no defaults for them.

Elsewhere the rule is `BlockRule()`.
"""
OUTPUTS: Final = (
    *contract.OUTPUTS,
    "block_mask",  # [B, H, ceil(T/128), ceil(T/128)] uint8, optional: tile, block
)
"""`block_mask` is 1 where a block is kept for a tile; 0 for tiles without a row in the call."""
TILE: Final = 128
"""Rows of a tile and keys of a block, both counted from the row's `first_valid`."""
SAMPLE_STEP: Final = 16
"""Every so many rows of a tile one is looked at: positions 15, 31, ... of it."""


@dataclass(frozen=True)
class BlockRule:
    """How a head chooses the blocks that a tile keeps; see `rule.kept_blocks`. Tokens.

    Raises:
        ConfigurationError: a value is out of its range; the message holds name and value.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    mass: float = 0.95
    min_length: int = 4096
    num_sink_tokens: int = 8
    sliding_window_size: int = 128
    num_last_tokens: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or not np.float32(self.mass):  # nodes hold 32 bits of it
            raise ConfigurationError(f"{ATTR_MASS} is {self.mass}, but must be in (0, 1]")
        contract.check_count(ATTR_MIN_LENGTH, self.min_length, 0)
        contract.check_count(contract.ATTR_SINK, self.num_sink_tokens, 0)
        contract.check_count(contract.ATTR_LAST, self.num_last_tokens, 1)
        contract.check_window(self.sliding_window_size)

    @property
    def is_dense(self) -> bool:
        """Whether every tile keeps every block, whatever the scores are."""
        return bool(np.float32(self.mass) == 1) or self.sliding_window_size == contract.DENSE_WINDOW

    @property
    def exact_length(self) -> int | None:
        """Longest prompt (tokens) that is read densely; None where all are (no limit).

        Up to `min_length`, and as long as the sinks' blocks reach the window's in every tile before
        the last rows.
        """
        if self.is_dense:
            return None
        sinks = -(-self.num_sink_tokens // TILE)
        first_gap = -(-(TILE * (sinks + 1) + self.sliding_window_size - 1) // TILE)
        return max(self.min_length, TILE * (first_gap + 1) + self.num_last_tokens - 1)

    def as_attributes(self) -> dict[str, int | float]:
        """The rule's attributes of a node, by ONNX name. `mass` is a float there, 1 included."""
        return {**asdict(self), ATTR_MASS: float(self.mass)}
