"""The manifest's section on static graphs: one cache, one graph for each kind of step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StaticTensor:
    """An input or an output of a static graph; `dtype` as NumPy spells it, or "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StaticGraph:
    """One file. `rows` S: `input_ids [1, S]`; `sha256` of the file without its weights."""

    file: str
    rows: int
    inputs: tuple[StaticTensor, ...]
    outputs: tuple[StaticTensor, ...]
    sha256: str


@dataclass(frozen=True)
class StaticGraphs:
    """Graphs over one cache `[1, G, slots, D]` whose first `start` slots hold keys.

    Inputs are `input_ids`, `start` `[1]` int32, and the cache (`LayerCache.past_*`); outputs are
    the new rows of the cache (`LayerCache.present_*`, `[1, G, S, D]`), which the runtime stores at
    `start`, and logits `[1, 1, vocabulary]`. `stream` takes prompt rows before the dense tail and
    gives no logits; `tail` takes up to `rows` of the last rows (input `length` `[1]` int32: how
    many are real, the rest on the right are pads); `decode` takes one row.
    """

    soc: str
    slots: int
    start: str
    length: str
    stream: StaticGraph
    tail: StaticGraph
    decode: StaticGraph
    weights_sha256: str

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> StaticGraphs:
        """Reads the section as JSON holds it; KeyError or TypeError where it is not whole."""
        graphs = {kind: _graph(content[kind]) for kind in ("stream", "tail", "decode")}
        return cls(**{**content, **graphs})


def _graph(content: Mapping[str, Any]) -> StaticGraph:
    sides = {
        side: tuple(
            StaticTensor(item["name"], item["dtype"], tuple(item["shape"]))
            for item in content[side]
        )
        for side in ("inputs", "outputs")
    }
    return StaticGraph(**{**content, **sides})
