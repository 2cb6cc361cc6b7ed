"""A plan's section on block-sparse layers: which ones, by which rule, and what they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.strict import STRICT
from trianglemix.exporter.errors import PlanError
from trianglemix.exporter.options import layer_ranges
from trianglemix.manifest.checked_json import Index

Densities = Mapping[int, Mapping[int, float]]


@dataclass(frozen=True)
class BlockSparsePlan:
    """The layers that may be block-sparse, and the rule they were measured under.

    `densities` are kept shares (0 to 1) of the causal block pairs, forced ones included, by prompt
    length in tokens and by layer, of other layers too. They and `figures` may be left out.

    Raises:
        PlanError: no layer, a layer twice, a length or a share out of its range.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    layers: tuple[Index, ...]
    rule: BlockRule = field(default_factory=BlockRule)
    densities: Densities = field(default_factory=dict)
    origin: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise PlanError(f"block_sparse names no layer, or one twice: {self.layers}")
        for length, by_layer in self.densities.items():
            for layer, share in by_layer.items():
                if length < 1 or not 0 < share <= 1:
                    raise PlanError(
                        f"block_sparse says that layer {layer} keeps {share} at {length} tokens; "
                        "a density is above 0 and at most 1"
                    )

    @property
    def layer_list(self) -> str:
        """The layers as `--block-sparse-layers` takes them."""
        return layer_ranges(self.layers)

    def density(self, layer: int, tokens: int) -> float | None:
        """The share of block pairs that a layer keeps of a prompt; None where nobody measured.

        Between two measured lengths it follows the logarithm of the length. A longer prompt is
        taken to keep what the longest measured one does, which is rather too much; a shorter one
        to keep everything.
        """
        measured = sorted(
            (length, by_layer[layer])
            for length, by_layer in self.densities.items()
            if layer in by_layer
        )
        if not measured:
            return None
        if tokens <= self.rule.min_length or tokens < measured[0][0]:
            return 1.0
        for (short, more), (long, less) in pairwise(measured):
            if tokens <= long:
                part = math.log(tokens / short) / math.log(long / short)
                return more + part * (less - more)
        return measured[-1][1]

    def as_json(self) -> dict[str, Any]:
        """The section as it stands in the file."""
        return {
            "layers": list(self.layers),
            "rule": self.rule.as_attributes(),
            "densities": {
                str(length): {str(layer): share for layer, share in sorted(by_layer.items())}
                for length, by_layer in sorted(self.densities.items())
            },
            "origin": self.origin,
            "figures": dict(self.figures),
        }
