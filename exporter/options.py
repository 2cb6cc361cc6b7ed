"""What the user asked for, checked once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.errors import ExportError

Weights = Literal["copy", "link"]
"""Files of their own (clones where the file system has them), or hard links of the source's."""
Dtype = Literal["auto", "float32", "float16"]


PREDICTED_TOKENS: Final = 32768
"""The prompt whose gain is predicted, where nothing is said and the context is not less."""


@dataclass(frozen=True)
class LayerRequest:
    """How the triangle layers are chosen: at most one of the fields is set.

    No `layers` at all, an empty tuple, is for exports whose only replaced layers are block-sparse.
    """

    start_layer: int | None = None
    layers: tuple[int, ...] | None = None
    count: int | None = None
    plan: Path | None = None

    @property
    def none_wanted(self) -> bool:
        """Whether no triangle layer is asked for by name."""
        return self.layers == ()


@dataclass(frozen=True)
class PatternRequest:
    """Pattern parameters given by the user; None = the plan's, or else the default."""

    sink: int | None = None
    window: int | None = None
    last: int | None = None

    def over(self, base: TrianglePattern) -> TrianglePattern:
        """`base` with what the user gave put in its place.

        Raises:
            ConfigurationError: a value out of its range.
        """
        return TrianglePattern(
            num_sink_tokens=base.num_sink_tokens if self.sink is None else self.sink,
            sliding_window_size=base.sliding_window_size if self.window is None else self.window,
            num_last_tokens=base.num_last_tokens if self.last is None else self.last,
        )


@dataclass(frozen=True)
class BlockRequest:
    """Which layers the user wants block-sparse: None = the plan's, none of them = an empty tuple.

    `mass` and `min_length` (tokens) None = the plan's, or else the default.
    """

    layers: tuple[int, ...] | None = None
    mass: float | None = None
    min_length: int | None = None

    @property
    def changes_rule(self) -> bool:
        """Whether a part of the rule was given."""
        return self.mass is not None or self.min_length is not None

    def over(self, base: BlockRule) -> BlockRule:
        """`base` with what the user gave put in its place.

        Raises:
            ConfigurationError: a value out of its range.
        """
        rule = base if self.mass is None else replace(base, mass=self.mass)
        return rule if self.min_length is None else replace(rule, min_length=self.min_length)


@dataclass(frozen=True)
class ExportOptions:
    """All options of one export.

    `dtype` is what the weights of a Hugging Face folder become; "auto" keeps their type where the
    target computes in it. `settings` are the target's own options (`Target.read_settings`).
    """

    source: Path
    output: Path | None = None
    target: str = "cpu"
    layers: LayerRequest = field(default_factory=LayerRequest)
    pattern: PatternRequest = field(default_factory=PatternRequest)
    blocks: BlockRequest = field(default_factory=BlockRequest)
    dense: bool = False
    last_token_logits: bool = False
    weights: Weights = "copy"
    prompt_length: int | None = None
    dry_run: bool = False
    verify: bool = False
    atol: float | None = None
    verify_tokens: int = 2048
    force: bool = False
    dtype: Dtype = "auto"
    settings: object | None = None

    def predicted_tokens(self, context: int | None) -> int:
        """The prompt of the predicted gain: what was asked for, else within the model's context."""
        if self.prompt_length is not None:
            return self.prompt_length
        return min(PREDICTED_TOKENS, context or PREDICTED_TOKENS)


def layer_ranges(layers: Iterable[int], comma: str = ",") -> str:
    """`0-3,5` of the layers 0, 1, 2, 3 and 5, as `parse_layers` reads it."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return comma.join("-".join(map(str, part)) for part in parts)


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Layers of a list like `5,7,10,15-35`, ascending; `option` is what gave it.

    Raises:
        ExportError: not such a list, a range that runs backwards, or a layer named twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ExportError(f"{option}: {part!r} is not a layer or a range; write 5,7,10,15-35")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ExportError(f"{option}: the range {part.strip()} runs backwards")
        layers.extend(range(first, last + 1))
    if len(set(layers)) != len(layers):
        raise ExportError(f"{option}: {text} names a layer twice")
    return tuple(sorted(layers))
