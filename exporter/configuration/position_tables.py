"""How many positions a graph has tables for: its rotations, and positions that were learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.walk import is_op, optional_input, small_constant

_SAME_INDEX: Final = (
    "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Tile", "Transpose", "Slice",
    "Gather",
)  # fmt: skip
_SAME_ROWS: Final = (
    "Cast", "Identity", "Squeeze", "Unsqueeze", "Expand", "Tile", "Slice", "CastLike",
)  # fmt: skip
_COSINES: Final = {
    ("com.microsoft", "RotaryEmbedding"): 2,
    ("com.microsoft", "GroupQueryAttention"): 7,
    ("", "RotaryEmbedding"): 1,
}
"""The input with a row for each position, of nodes that turn by themselves."""
_MATRIX: Final = 2
_MAX_STEPS: Final = 14


def table_length(graph: ir.Graph) -> int | None:
    """The longest text (tokens) for which every table that positions choose from has rows.

    None where there is no such table. Beyond it a Gather fails or a kernel reads what is not the
    table's: neither is the model. Tables in branches are left out: which one is read depends on
    the length.
    """
    return min((length for node in graph for length in _lengths(node)), default=None)


def _lengths(node: ir.Node) -> Iterator[int]:
    if is_op(node, "Gather", "GatherElements"):
        rows, shift = _rows(optional_input(node, 0)), _shift(optional_input(node, 1), _MAX_STEPS)
        if rows is not None and shift is not None and rows > max(shift, 1):
            yield rows - shift
        return
    triangles = AttentionNode.all_of([node])
    turned = triangles[0].rotation if triangles else None
    domain = "" if node.domain == "ai.onnx" else node.domain
    index = _COSINES.get((domain, node.op_type))
    table = turned.cosines if turned else optional_input(node, index) if index else None
    rows = _rows(table)
    if rows is not None and table is not None and len(table.shape or ()) == _MATRIX:
        yield rows


def _rows(value: ir.Value | None) -> int | None:
    """The first size above 1 of a constant matrix, which is what positions count."""
    for _ in range(_MAX_STEPS):
        node = None if value is None else value.producer()
        if node is None or not is_op(node, *_SAME_ROWS):
            break
        value = optional_input(node, 0)
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    sizes = [size for size in tensor.shape.numpy() if size != 1]
    return sizes[0] if len(sizes) >= _MATRIX else None


def _shift(value: ir.Value | None, steps: int) -> int | None:
    """By how much an index exceeds the token's position; None where it is no position."""
    node = None if value is None else value.producer()
    if value is None or steps == 0:
        return None
    if node is None:
        return 0 if value.is_graph_input() and "position" in str(value.name) else None
    if is_op(node, "Range"):  # slots of the call or of the cache; one of constants is no position
        return None if small_constant(optional_input(node, 1)) is not None else 0
    if is_op(node, "CumSum"):  # of a mask: how many tokens there are up to this one
        return 1
    if is_op(node, *_SAME_INDEX):
        return _shift(optional_input(node, 0), steps - 1)
    sides = [optional_input(node, index) for index in range(3 if is_op(node, "Where") else 2)]
    if is_op(node, "Add", "Sub"):
        return _moved(node, sides, steps)
    if is_op(node, "Mul", "Where"):  # by a mask; for negative indices another
        found = [_shift(side, steps - 1) for side in sides if side is not None]
        return min((shift for shift in found if shift is not None), default=None)
    return None


def _moved(node: ir.Node, sides: list[ir.Value | None], steps: int) -> int | None:
    """A position and a number, or two of which one counts."""
    for side, other in ((0, 1), (1, 0)):
        number = small_constant(sides[other], limit=1)
        shift = None if number is None else _shift(sides[side], steps - 1)
        if number is not None and shift is not None:
            return shift + int(number.reshape(())) * (1 if is_op(node, "Add") else -1)
    found = [_shift(side, steps - 1) for side in sides]
    return min((shift for shift in found if shift is not None), default=None)
