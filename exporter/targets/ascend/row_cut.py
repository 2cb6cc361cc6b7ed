"""Where a source keeps its last row of hidden states itself, before the head."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.roles import find_roles, rank
from trianglemix.exporter.graph.walk import is_op, needed_input, optional_input, small_constant
from trianglemix.exporter.interface.language_model_head import find_head

_FAR: Final = 2**31 - 1  # an end beyond every length
_ROWS: Final = 1  # axis of hidden states `[B, S, hidden]`


def cuts_its_last_row(graph: ir.Graph) -> bool:
    """Whether the head of a graph sees what `before_row_cut` can undo."""
    head = find_head(find_roles(graph))
    return head is not None and before_row_cut(head.hidden) is not head.hidden


def before_row_cut(hidden: ir.Value) -> ir.Value:
    """The hidden states of all rows, where a Slice or Gather of the last one made `hidden`.

    The last row of a static graph may be padding, so that the cut must go.
    """
    node = hidden.producer()
    if node is None or not (_slices_last(node) or _gathers_last(node)):
        return hidden
    return needed_input(node, 0)


def _slices_last(node: ir.Node) -> bool:
    if not is_op(node, "Slice"):
        return False
    starts, ends, axes, steps = (_number(node, index) for index in range(1, 5))
    last = starts == -1 and ends is not None and ends >= _FAR
    return last and axes in (_ROWS, _ROWS - 3) and steps in (None, 1)


def _gathers_last(node: ir.Node) -> bool:
    """One that keeps the axis of rows."""
    if not is_op(node, "Gather") or node.attributes.get_int("axis", 0) not in (_ROWS, _ROWS - 3):
        return False
    return _number(node, 1) == -1 and rank(needed_input(node, 1)) == 1


def _number(node: ir.Node, index: int) -> int | None:
    constant = small_constant(optional_input(node, index), limit=1)
    return None if constant is None else int(constant.reshape(-1)[0])
