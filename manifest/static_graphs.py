"""The manifest's section on static graphs: one cache, one graph for each kind of step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.strict import STRICT
from trianglemix.manifest.checked_json import Count, FileName

Lowering = Literal["block", "custom"]
"""What became of the attentions: standard operators in block form, or the custom operator."""


@dataclass(frozen=True)
class StaticTensor:
    """An input or an output of a static graph; `dtype` as NumPy spells it, or "bfloat16"."""

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class StaticGraph:
    """One file. `rows` S: `input_ids [1, S]`; `sha256` of the file without its weights."""

    __pydantic_config__: ClassVar[Any] = STRICT

    file: FileName
    rows: Count
    inputs: tuple[StaticTensor, ...]
    outputs: tuple[StaticTensor, ...]
    sha256: str


@dataclass(frozen=True)
class StaticPart:
    """Rows `begin .. end - 1` of a sequence, run by one call of a graph."""

    graph: StaticGraph
    begin: int
    end: int


@dataclass(frozen=True)
class StaticGraphs:
    """Graphs over one cache `[1, G, slots, D]` whose first `start` slots hold keys.

    Inputs are `input_ids`, `start` `[1]` int32, and the cache (`LayerCache.past_*`); outputs are
    the new rows of the cache (`LayerCache.present_*`, `[1, G, S, D]`), which the runtime stores at
    `start`, and logits `[1, 1, vocabulary]`. `stream` takes prompt rows before the dense tail and
    gives no logits; `tail` takes up to `rows` of the last rows (input `length` `[1]` int32: how
    many are real, the rest on the right are pads); `decode` takes one row.

    With the lowering "custom" attention is the operator `trianglemix::TriangleAttention`, the
    cache inputs have spare slots behind `slots` for pads, and `custom_operator` says what has to
    be installed first.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    soc: str
    slots: Count
    start: str
    length: str
    stream: StaticGraph
    tail: StaticGraph
    decode: StaticGraph
    weights_sha256: str
    lowering: Lowering = "block"
    custom_operator: str | None = None

    @property
    def graphs(self) -> tuple[StaticGraph, ...]:
        """All of them, the longest step first."""
        return self.stream, self.tail, self.decode

    def parts(self, begin: int, end: int, tail_begin: int) -> Iterator[StaticPart]:
        """Rows `begin .. end - 1` cut into calls; those from `tail_begin` on are dense."""
        tail_begin = min(max(begin, tail_begin), end)
        for first in range(begin, tail_begin, self.stream.rows):
            yield StaticPart(self.stream, first, min(first + self.stream.rows, tail_begin))
        for first in range(tail_begin, end, self.tail.rows):
            last = min(first + self.tail.rows, end)
            yield StaticPart(self.decode if last - first == 1 else self.tail, first, last)

    def small_feeds(self, part: StaticPart, input_ids: str, ids: Array) -> dict[str, Array]:
        """The inputs of one call but for the cache; `ids` `[1, rows]`, padded on the right."""
        rows = part.end - part.begin
        dtypes = {tensor.name: tensor.dtype for tensor in part.graph.inputs}
        padded = np.zeros((1, part.graph.rows), dtypes[input_ids])
        padded[:, :rows] = ids
        feeds: dict[str, Array] = {input_ids: padded, self.start: np.array([part.begin], np.int32)}
        if part.graph is self.tail:
            feeds[self.length] = np.array([rows], np.int32)
        return feeds
