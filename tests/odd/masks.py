"""Kinds of attention masks: which keys a row may see besides "not later than itself".

Each kind writes a bool `[S, T]` (or what broadcasts with `[B, H, S, T]`) into the graph, from the
slots of rows and keys, token ids, or positions. Its `family` says what the exporter owes it:
"causal" and "window" can be exported, "other" must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from tests.odd.graph_writer import GraphWriter

BUFFER: Final = 1024
"""Rows and columns of a mask that lies in the file."""
ROWS: Final = 1 << 15
"""Rows of a table by row."""
Family = Literal["causal", "window", "other"]


@dataclass(frozen=True)
class Slots:
    """What a mask may be made of: names of values in the graph."""

    rows: str  # [S, 1] int64: slots of the new tokens
    keys: str  # [T] int64
    past: str  # [1] int64
    length: str  # [1] int64: S
    total: str  # [1] int64: T
    ids: str  # [B, S]
    size: int  # the window, chunk or threshold of the kind
    heads: int


Write = Callable[[GraphWriter, Slots], str]


@dataclass(frozen=True)
class MaskKind:
    """`uncached`: it looks at ids of keys, which only a graph without a cache has.

    `buffered`: it lies in the file with `BUFFER` rows, and nothing longer runs. `power`: its size
    must be a power of two.
    """

    family: Family
    write: Write
    uncached: bool = False
    buffered: bool = False
    power: bool = False


def _distance(g: GraphWriter, s: Slots) -> str:
    return str(g.op("Sub", s.rows, s.keys))


def _float_distance(g: GraphWriter, s: Slots) -> str:
    return g.cast(_distance(g, s), "float32")


def _real(g: GraphWriter, value: float) -> str:
    return g.constant(value, np.float32)


def _causal(g: GraphWriter, s: Slots) -> str:
    return str(g.op("GreaterOrEqual", s.rows, s.keys))


def _less(g: GraphWriter, s: Slots) -> str:
    return str(g.op("Less", _distance(g, s), g.constant(s.size)))


def _not_greater(g: GraphWriter, s: Slots) -> str:
    far = g.op("Greater", _distance(g, s), g.constant(s.size - 1))
    return str(g.op("Not", far))


def _behind_row(g: GraphWriter, s: Slots) -> str:
    return str(g.op("Greater", s.keys, g.op("Sub", s.rows, g.constant([s.size]))))


def _floats(g: GraphWriter, s: Slots) -> str:
    return str(g.op("Less", _float_distance(g, s), _real(g, s.size - 0.5)))


def _relu(g: GraphWriter, s: Slots) -> str:
    beyond = g.op("Relu", g.op("Sub", _float_distance(g, s), _real(g, s.size - 1)))
    return str(g.op("Greater", g.op("Sub", _real(g, 1), beyond), _real(g, 0.5)))


def _absolute(g: GraphWriter, s: Slots) -> str:
    return str(g.op("Less", g.op("Abs", _distance(g, s)), g.constant(s.size)))


def _product(g: GraphWriter, s: Slots) -> str:
    size = g.op("Add", g.op("Mul", g.constant(s.size // 7), g.constant(7)), g.constant(s.size % 7))
    return str(g.op("Less", _distance(g, s), size))


def _power(g: GraphWriter, s: Slots) -> str:
    size = g.op("Pow", _real(g, 2), _real(g, int(np.log2(s.size))))
    return str(g.op("Less", _distance(g, s), g.cast(size, "int64")))


def _from_shape(g: GraphWriter, s: Slots) -> str:
    size = g.op("Shape", g.constant(np.zeros(s.size), np.float32))
    return str(g.op("Less", _distance(g, s), size))


def _trilu(g: GraphWriter, s: Slots) -> str:
    sizes = g.op("Concat", s.total, s.total, axis=0)
    ones = g.op("Expand", _real(g, 1), sizes)
    far = g.op("Trilu", ones, g.constant(-s.size), upper=0)
    square = g.op("Equal", far, _real(g, 0))
    return g.tail(str(square), s.past, 0)


def _band(size: int) -> np.ndarray:
    i, j = np.arange(BUFFER)[:, None], np.arange(BUFFER)[None]
    return (j <= i) & (i - j < size)


def _bool_buffer(g: GraphWriter, s: Slots) -> str:
    buffer = g.constant(_band(s.size)[None, None], np.bool_)
    rows = g.op("Slice", buffer, s.past, s.total, g.ints(2))
    return str(g.op("Slice", rows, g.ints(0), s.total, g.ints(3)))


def _gathered_buffer(g: GraphWriter, s: Slots) -> str:
    buffer = g.constant(_band(s.size), np.bool_)
    rows = g.op("Gather", buffer, g.op("Squeeze", s.rows, g.ints(1)), axis=0)
    return str(g.op("Gather", rows, s.keys, axis=1))


def _float_buffer(g: GraphWriter, s: Slots) -> str:
    buffer = g.constant(np.where(_band(s.size), 0, -1e9), np.float32)
    rows = g.op("Slice", buffer, s.past, s.total, g.ints(0))
    part = g.op("Slice", rows, g.ints(0), s.total, g.ints(1))
    return str(g.op("Greater", part, _real(g, -1)))


def _chunk(g: GraphWriter, s: Slots) -> str:
    size = g.constant(s.size)
    return str(g.op("Equal", g.op("Div", s.rows, size), g.op("Div", s.keys, size)))


def _float_chunk(g: GraphWriter, s: Slots) -> str:
    def number(slots: str) -> str:
        return str(g.op("Floor", g.op("Div", g.cast(slots, "float32"), _real(g, s.size))))

    return str(g.op("Equal", number(s.rows), number(s.keys)))


def _modulo_chunk(g: GraphWriter, s: Slots) -> str:
    start = g.op("Sub", s.rows, g.op("Mod", s.rows, g.constant(s.size)))
    return str(g.op("LessOrEqual", start, s.keys))


def _document(g: GraphWriter, s: Slots) -> str:
    ends = g.cast(str(g.op("Equal", s.ids, g.constant(s.size, _ids_type(g)))), "int64")
    number = g.op("CumSum", ends, g.constant(1))
    same = g.op("Equal", g.unsqueeze(number, 2), g.unsqueeze(number, 1))
    return g.unsqueeze(str(same), 1)


def _hidden_token(g: GraphWriter, s: Slots) -> str:
    hidden = g.op("Not", g.op("Equal", s.ids, g.constant(s.size, _ids_type(g))))
    own = g.op("Equal", s.rows, s.keys)  # a row without any key is nobody's
    return str(g.op("Or", g.unsqueeze(str(hidden), 1, 2), own))


def _dilated(g: GraphWriter, s: Slots) -> str:
    distance = _distance(g, s)
    even = g.op("Equal", g.op("Mod", distance, g.constant(2)), g.constant(0))
    return str(g.op("Or", even, g.op("Less", distance, g.constant(s.size))))


def _sinks(g: GraphWriter, s: Slots) -> str:
    near = g.op("Less", _distance(g, s), g.constant(s.size))
    return str(g.op("Or", near, g.op("Less", s.keys, g.constant(2))))


def _beyond_length(g: GraphWriter, s: Slots) -> str:
    near = g.op("Less", _distance(g, s), g.constant(max(2, s.size // 2)))
    return str(g.op("Or", near, g.op("LessOrEqual", s.total, g.constant(s.size))))


def _by_head(g: GraphWriter, s: Slots) -> str:
    sizes = np.full((1, s.heads, 1, 1), 1 << 30)
    sizes[:, -1] = s.size
    return str(g.op("Less", _distance(g, s), g.constant(sizes)))


def _early_rows(g: GraphWriter, s: Slots) -> str:
    near = g.op("Less", _distance(g, s), g.constant(max(2, s.size // 2)))
    return str(g.op("Or", near, g.op("Less", s.rows, g.constant(s.size))))


def _long_prompt(g: GraphWriter, s: Slots) -> str:
    """Chunks, for whom so many new tokens are given at once; everything for the others."""
    return str(g.op("Or", _chunk(g, s), g.op("LessOrEqual", s.length, g.constant([s.size]))))


def _token_table(g: GraphWriter, s: Slots) -> str:
    """The row of one token sees everything; which token, a table by token says."""
    table = np.arange(128) == 72
    all_seeing = g.op("Gather", g.constant(table, np.bool_), s.ids)
    return str(g.op("Or", _less(g, s), g.unsqueeze(str(all_seeing), 1, 3)))


def _row_table(g: GraphWriter, s: Slots) -> str:
    """One row sees everything; which, a table by row says."""
    table = np.arange(ROWS) == 2 * s.size + 1
    all_seeing = g.op("Gather", g.constant(table, np.bool_), s.rows)
    return str(g.op("Or", _less(g, s), all_seeing))


def _segments(g: GraphWriter, s: Slots) -> str:
    """Numbers of documents come in attention_mask."""
    keys = g.unsqueeze(g.cast("attention_mask", "int64"), 1, 2)
    rows = g.tail(keys, s.past, 3)
    return str(g.op("Equal", g.op("Transpose", rows, perm=[0, 1, 3, 2]), keys))


def _later_segments(g: GraphWriter, s: Slots) -> str:
    """A document sees those before it, in the order of their numbers."""
    keys = g.unsqueeze(g.cast("attention_mask", "float32"), 1, 2)
    rows = g.tail(keys, s.past, 3)
    apart = g.op("Sub", g.op("Transpose", rows, perm=[0, 1, 3, 2]), keys)
    return str(g.op("Not", g.op("Greater", _real(g, -0.5), apart)))


def _ids_type(g: GraphWriter) -> str:
    (ids,) = [x for x in g.inputs if x.name == "input_ids"]
    return "int32" if ids.type.tensor_type.elem_type == 6 else "int64"


MASKS: Final[dict[str, MaskKind]] = {
    "causal": MaskKind("causal", _causal),
    "less": MaskKind("window", _less),
    "not_greater": MaskKind("window", _not_greater),
    "behind_row": MaskKind("window", _behind_row),
    "floats": MaskKind("window", _floats),
    "relu": MaskKind("window", _relu),
    "absolute": MaskKind("window", _absolute),
    "product": MaskKind("window", _product),
    "power": MaskKind("window", _power, power=True),
    "from_shape": MaskKind("window", _from_shape),
    "trilu": MaskKind("window", _trilu),
    "bool_buffer": MaskKind("window", _bool_buffer, buffered=True),
    "gathered_buffer": MaskKind("window", _gathered_buffer, buffered=True),
    "float_buffer": MaskKind("window", _float_buffer, buffered=True),
    "chunk": MaskKind("other", _chunk),
    "float_chunk": MaskKind("other", _float_chunk),
    "modulo_chunk": MaskKind("other", _modulo_chunk),
    "document": MaskKind("other", _document, uncached=True),
    "hidden_token": MaskKind("other", _hidden_token, uncached=True),
    "dilated": MaskKind("other", _dilated),
    "sinks": MaskKind("other", _sinks),
    "beyond_length": MaskKind("other", _beyond_length),
    "by_head": MaskKind("other", _by_head),
    "early_rows": MaskKind("other", _early_rows),
    "long_prompt": MaskKind("other", _long_prompt),
    "token_table": MaskKind("other", _token_table),
    "row_table": MaskKind("other", _row_table),
    "segments": MaskKind("other", _segments),
    "later_segments": MaskKind("other", _later_segments),
}
SEGMENTS: Final = ("segments", "later_segments")
"""Kinds for which attention_mask numbers documents."""
