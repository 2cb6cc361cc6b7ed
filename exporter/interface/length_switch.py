"""Lengths at which a graph computes otherwise for every token, as longrope's rotation does."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.walk import is_op, optional_input, small_constant

_COMPARISONS: Final = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")
_ON_THE_WAY: Final = (
    "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Add", "Sub", "Max", "Min", "Gather",
)  # fmt: skip
_LENGTHS: Final = ("Shape", "Size", "ReduceMax", "ReduceSum")
_AFTER: Final = ("Cast", "Identity", "Not", "And", "Or", "Squeeze", "Unsqueeze", "Reshape")
_LEAST: Final = 2  # a length compared with 0 or 1 tells whether there is a past
_MAX_STEPS: Final = 16


def length_switches(graph: ir.Graph) -> tuple[int, ...]:
    """The numbers of tokens with which a length is compared to choose one thing or another.

    A prompt that is read in parts on both sides of such a number is not the prompt read at once:
    keys that were stored before it were made otherwise.
    """
    found = set()
    for node in graph:
        if not is_op(node, *_COMPARISONS):
            continue
        for length, bound in ((0, 1), (1, 0)):
            number = small_constant(optional_input(node, bound), limit=1)
            if number is None or not float(number.reshape(())) >= _LEAST:
                continue
            value = optional_input(node, length)
            if _is_length(value, _MAX_STEPS) and _chooses(node.outputs[0]):
                found.add(_last_before(node, int(number.reshape(())), bound) - _excess(value))
    return tuple(sorted(found))


def _last_before(node: ir.Node, number: int, bound: int) -> int:
    """The greatest length that a comparison still takes for a short one: `length > 9` parts
    after 9, `length >= 9` after 8."""
    after = ("Greater", "LessOrEqual") if bound == 1 else ("Less", "GreaterOrEqual")
    return number if is_op(node, *after, "Equal") else number - 1


def _excess(value: ir.Value | None) -> int:
    """By how much a value exceeds the number of tokens: the largest position is one less."""
    excess = 0
    for _ in range(_MAX_STEPS):
        node = None if value is None else value.producer()
        if node is None or is_op(node, "Shape", "Size", "ReduceSum"):
            return excess
        sides = [optional_input(node, index) for index in (0, 1)]
        if is_op(node, "Add", "Sub"):
            steps = [small_constant(side, limit=1) for side in sides]
            known = next((step for step in steps if step is not None), None)
            if known is None:
                return excess
            excess += int(known.reshape(())) * (1 if is_op(node, "Add") else -1)
            value = sides[0] if steps[0] is None else sides[1]
        elif is_op(node, "ReduceMax"):
            return excess - 1  # of positions, since the greatest entry of a mask is no length
        else:
            value = sides[0]
    return excess


def _is_length(value: ir.Value | None, steps: int) -> bool:
    """Whether a value is one number for the whole call, counted from shapes, masks or positions."""
    if value is None or steps == 0:
        return False
    node = value.producer()
    if node is None:
        return value.is_graph_input() and value.shape is not None and len(value.shape) == 0
    if is_op(node, *_LENGTHS):
        return True
    return is_op(node, *_ON_THE_WAY) and any(_is_length(x, steps - 1) for x in node.inputs)


def _chooses(value: ir.Value, steps: int = _MAX_STEPS) -> bool:
    """Whether a condition decides what an If or a Where gives."""
    for node, index in value.uses():
        if index == 0 and is_op(node, "If", "Where"):
            return True
        if steps and is_op(node, *_AFTER) and _chooses(node.outputs[0], steps - 1):
            return True
    return False
