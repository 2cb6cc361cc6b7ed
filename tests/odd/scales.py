"""Kinds of what happens to the scores of queries and keys before the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.odd.graph_writer import GraphWriter
from tests.odd.masks import Slots

TABLE: Final = 1 << 14
"""Rows of a table by position."""


@dataclass(frozen=True)
class Scaled:
    """What a kind may change: queries `[B, H, S, D]`, keys `[B, H, T, D]`, and then the scores."""

    query: str
    key: str


Before = Callable[[GraphWriter, Slots, Scaled, float], Scaled]
After = Callable[[GraphWriter, Slots, str, float], str]


@dataclass(frozen=True)
class ScaleKind:
    """`carried`: one number, with or without a softcap, says it, whatever the length."""

    carried: bool
    before: Before = lambda g, s, x, scale: x
    after: After = lambda g, s, scores, scale: scores


def _times(g: GraphWriter, value: str, number: float) -> str:
    return str(g.op("Mul", value, g.number(number)))


def _divided(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    return str(g.op("Div", scores, g.number(1 / scale)))


def _softcap(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    inner = g.op("Tanh", g.op("Div", _times(g, scores, scale), g.number(5)))
    return _times(g, str(inner), 5)


def _clipped(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    return str(g.op("Clip", _times(g, scores, scale), g.number(-4), g.number(4)))


def _log_of_total(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    """`max(1, log(T) / log(size))`, as models that stretch their context have it."""
    total = g.cast(s.total, "float32")
    ratio = g.op("Div", g.op("Log", total), g.constant(math.log(s.size), np.float32))
    factor = g.op("Max", ratio, g.constant(1, np.float32))
    return str(g.op("Mul", _times(g, scores, scale), g.cast(str(factor), g.dtype)))


def _by_row(g: GraphWriter, s: Slots, x: Scaled, scale: float) -> Scaled:
    """A factor of the query's position, 1 up to `size`, from a table."""
    position = np.arange(1, TABLE + 1)
    factor = np.maximum(1, np.log(position) / math.log(s.size)).reshape(-1, 1)
    rows = g.op("Gather", g.constant(factor, g.dtype), g.op("Squeeze", s.rows, g.ints(1)))
    return Scaled(str(g.op("Mul", _times(g, x.query, scale), rows)), x.key)


def _by_floor(g: GraphWriter, s: Slots, x: Scaled, scale: float) -> Scaled:
    """`1 + 0.5 * log(1 + floor((i + 1) / size))`, which only long rows feel."""
    row = g.cast(s.rows, "float32")
    steps = g.op("Floor", g.op("Div", row, g.constant(s.size, np.float32)))
    grown = g.op("Log", g.op("Add", steps, g.constant(1, np.float32)))
    half = g.op("Mul", grown, g.constant(0.5, np.float32))
    factor = g.op("Add", half, g.constant(1, np.float32))
    return Scaled(str(g.op("Mul", _times(g, x.query, scale), g.cast(str(factor), g.dtype))), x.key)


def _by_distance(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    """A bias by head that falls with the distance, as ALiBi has it."""
    slope = g.constant(np.linspace(0.05, 0.2, s.heads).reshape(1, -1, 1, 1), np.float32)
    bias = g.op("Mul", slope, g.cast(g.op("Sub", s.keys, s.rows), "float32"))
    return str(g.op("Add", _times(g, scores, scale), g.cast(bias, g.dtype)))


def _far_bias(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    """A bias on keys that are at least `size` away, as buckets of relative positions have it."""
    far = g.op("GreaterOrEqual", g.op("Sub", s.rows, s.keys), g.constant(s.size))
    bias = g.op("Where", far, g.number(-1.5), g.number(0))
    return str(g.op("Add", _times(g, scores, scale), bias))


def _of_long_prompt(g: GraphWriter, s: Slots, scores: str, scale: float) -> str:
    """A factor of 1.5 for whom more than 100 new tokens are given at once."""
    longer = g.op("Greater", s.length, g.constant([100]))
    factor = g.op("Where", longer, g.number(1.5), g.number(1))
    return str(g.op("Mul", _times(g, scores, scale), factor))


SCALES: Final[dict[str, ScaleKind]] = {
    "times": ScaleKind(True, after=lambda g, s, scores, scale: _times(g, scores, scale)),
    "divided": ScaleKind(True, after=_divided),
    "on_query": ScaleKind(
        True, before=lambda g, s, x, scale: Scaled(_times(g, x.query, scale), x.key)
    ),
    "on_key": ScaleKind(
        True, before=lambda g, s, x, scale: Scaled(x.query, _times(g, x.key, scale))
    ),
    "on_both": ScaleKind(
        True,
        before=lambda g, s, x, scale: Scaled(
            _times(g, x.query, scale**0.5), _times(g, x.key, scale**0.5)
        ),
    ),
    "softcap": ScaleKind(True, after=_softcap),
    "by_distance": ScaleKind(False, after=_by_distance),
    "far_bias": ScaleKind(False, after=_far_bias),
    "clipped": ScaleKind(False, after=_clipped),
    "log_of_total": ScaleKind(False, after=_log_of_total),
    "by_row": ScaleKind(False, before=_by_row),
    "of_long_prompt": ScaleKind(False, after=_of_long_prompt),
    "by_floor": ScaleKind(False, before=_by_floor),
}
