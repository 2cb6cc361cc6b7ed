"""Says why the numbers of what looks like attention are not attention's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.attention.attention_probe import (
    CallSizes,
    ProbeInputs,
    ShapesOf,
    heads_apart,
)
from trianglemix.exporter.attention.cutout import CutError, cut_out, run_cut
from trianglemix.exporter.attention.sites import MatchContext
from trianglemix.exporter.patterns._softmax_walk import Walk

_EQUAL: Final = 1e-3
"""How far, relatively, equal scores may give unequal weights, or their sum be from 1."""


def why_other_numbers(
    context: MatchContext, weights: ir.Value, shapes_of: ShapesOf, sizes: CallSizes
) -> str | None:
    """What the softmax does besides a mask, by its weights `[B, H, S, T]` at equal scores.

    None where they are what a mask makes of them.
    """
    try:
        cut = cut_out(context.graph, list(shapes_of(sizes)), [weights])
        shapes = {value: shape for value, shape in shapes_of(sizes).items() if value in cut.inputs}
        equal = {value: np.zeros(shape, np.float32) for value, shape in shapes.items()}
        (result,) = run_cut(cut, ProbeInputs(context).feeds(cut, sizes, equal))
    except CutError:
        return None
    found = heads_apart(result, sizes.batch)
    return why_uneven(found, sizes) if found.ndim == len(_AXES) else None


_AXES: Final = "BHST"


def why_uneven(weights: Array, sizes: CallSizes) -> str | None:
    """The first real row that is not the same number for each key that it sees."""
    position = np.arange(sizes.past, sizes.total)
    real = position[None, None, :] >= sizes.first_valid()[:, None, None]
    total = weights.sum(axis=-1)
    short = real & (np.abs(total - 1) > _EQUAL)
    if short.any():
        index = _first(short)
        return (
            f"its softmax has another denominator: the weights of row {index[2]} in head "
            f"{index[1]} sum to {total[index]:.3g} (attention sinks, softmax-plus-one, or weights "
            "scaled afterwards), which the operator has no counterpart for"
        )
    seen = weights > 0
    mean = total / np.maximum(seen.sum(axis=-1), 1)
    uneven = seen & real[..., None] & (np.abs(weights - mean[..., None]) > _EQUAL * mean[..., None])
    if uneven.any():
        b, h, s, t = _first(uneven)
        by_head = np.abs(weights - weights[:, :1]).max() > _EQUAL
        return (
            "something is added to its scores by position"
            + (" and by head" if by_head else "")
            + f" (ALiBi, a relative position bias): equal scores give key {t} of row {s} in head "
            f"{h} {weights[b, h, s, t] / mean[b, h, s]:.3g} times the mean weight; the operator "
            "adds nothing to the scores"
        )
    return None


def _first(where: NDArray[np.bool_]) -> tuple[int, ...]:
    indices: Sequence[Sequence[int]] = np.argwhere(where).tolist()
    return tuple(indices[0])


def why_other_heads(
    context: MatchContext, walk: Walk, shapes: dict[ir.Value, tuple[int, ...]], sizes: CallSizes
) -> str | None:
    """Query heads that do not share key heads in a row, seen by keys that hold their head's number.

    `shapes` are those of the new keys and their past.
    """
    axis = walk.key.axes.index("H")
    count = next(iter(shapes.values()))[axis]
    numbers = np.arange(count, dtype=np.float32)
    apart = numbers.reshape([-1 if name == "H" else 1 for name in walk.key.axes])
    given = {value: np.broadcast_to(apart, shape).copy() for value, shape in shapes.items()}
    try:
        cut = cut_out(context.graph, list(given), [walk.key_operand])
        (operand,) = run_cut(cut, ProbeInputs(context).feeds(cut, sizes, given))
    except CutError:
        return None
    if operand.ndim != len(_AXES) or not np.abs(operand).max() > 0:
        return None
    found = operand[0, :, 0, 0] * ((count - 1) / np.abs(operand).max())  # keys may be scaled
    expected = np.arange(len(found)) // max(1, len(found) // count)
    wrong = np.flatnonzero(np.round(found) != expected)
    if not wrong.size:
        return None
    head = int(wrong[0])
    return (
        f"its query head {head} reads key head {int(np.round(found[head]))}, not {expected[head]}: "
        "key heads are repeated in turn (0 1 0 1), and the operator gives each its query heads in "
        "a row (0 0 1 1)"
    )
