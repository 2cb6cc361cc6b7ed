"""Measures a decomposed attention that was read from the graph: heads, scale, mask, numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.attention.attention_probe import (
    TOLERANCE,
    CallSizes,
    ProbeInputs,
    ShapesOf,
    calls_for,
    measured_output_layout,
    pattern_of,
)
from trianglemix.exporter.attention.cutout import CutError, OpenCut, cut_out, run_cut
from trianglemix.exporter.attention.far_calls import FARTHEST, row_totals
from trianglemix.exporter.attention.head_trace import Heads
from trianglemix.exporter.attention.sites import Layout, MaskClass, MatchContext
from trianglemix.exporter.graph.attention_node import NEVER_LAST
from trianglemix.exporter.graph.walk import Factor, producer_of, small_constant
from trianglemix.exporter.patterns._softmax_reasons import why_other_heads, why_other_numbers
from trianglemix.exporter.patterns._softmax_rows import softmax_mask
from trianglemix.exporter.patterns._softmax_walk import Walk, sizes_by_axis

_SCALE_ROUNDING: Final = {ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1e-2}
"""How far a scale may be from `D**-0.5` and still mean it, in types that round it; else 1e-5."""


_LONG: Final = 611  # past tokens of a call that is compared as a whole
_LONG_PROMPT: Final = 150
_LOUD: Final = 25.0
_LOUD_TOLERANCE: Final = 2e-3
_MAX_PROBE_BYTES: Final = 1 << 28


@dataclass(frozen=True)
class Measured:
    """What the probe found; `output_index` counts in `Walk.outputs`."""

    attention: Attention
    mask: MaskClass
    output_index: int
    output_layout: Layout


def measure(walk: Walk, context: MatchContext) -> Measured:
    """Runs the cut-out site on random queries, keys and values and compares with the reference.

    Raises:
        CutError: it is not attention as the operator means it.
        ConfigurationError: head sizes that the operator does not take.
    """
    shape = _head_shape(walk, context)
    mask = softmax_mask(walk, context, partial(_boundary, walk, shape))
    _check_factors(walk, context, partial(_boundary, walk, shape), mask)
    outputs = [*walk.outputs, *(factor.value for factor in walk.factors)]
    cut = OpenCut(cut_out(context.graph, walk.boundary, outputs))
    probe = _Probe(walk, context, shape, mask, cut)
    try:
        found = {probe.measure(sizes) for sizes in calls_for(walk.has_past)}
    except CutError as error:
        raise _explained(error, probe) from error
    loud = CallSizes(1, 2, _LONG, 0) if walk.has_past else CallSizes(1, _LONG_PROMPT, 0)
    if loud.total <= (mask.seen_to or loud.total):
        found.add(probe.measure(loud, loudness=_LOUD))
    if len(found) > 1:
        raise CutError("its scale or the layout of its output changes from call to call")
    (measured,) = found
    return measured


def _explained(error: CutError, probe: _Probe) -> CutError:
    """The error with its cause, where the numbers tell one."""
    walk, sizes = probe.walk, calls_for(probe.walk.has_past)[0]
    shapes = partial(_all_heads, walk, probe.shape)
    reason = why_other_numbers(probe.context, walk.weights, shapes, sizes)
    if reason is None:
        reason = why_other_heads(probe.context, walk, _heads_shapes(walk.key, sizes), sizes)
    return error if reason is None else CutError(reason)


def _check_factors(walk: Walk, context: MatchContext, shapes_of: ShapesOf, mask: MaskClass) -> None:
    """The factors of the scores must be the same numbers at every length.

    Raises:
        CutError: one is not; the message names the length.
    """
    values = [x.value for x in walk.factors if ir.convenience.get_const_tensor(x.value) is None]
    if not values:
        return
    cut = OpenCut(cut_out(context.graph, walk.boundary, values))
    inputs, first = ProbeInputs(context), None
    calls = [CallSizes(1, 1, total - 1) if walk.has_past else CallSizes(1, total, 0)
             for total in row_totals(mask.seen_to or FARTHEST)]  # fmt: skip
    for sizes in calls:
        shapes = {x: shape for x, shape in shapes_of(sizes).items() if x in cut.cut.inputs}
        if sum(4 * math.prod(shape) for shape in shapes.values()) > _MAX_PROBE_BYTES:
            break
        given = {value: np.zeros(shape, np.float32) for value, shape in shapes.items()}
        found = cut.run(inputs.feeds(cut.cut, sizes, given))
        first = first or found
        for value, one, other in zip(values, first, found, strict=True):
            if one.shape != other.shape or not np.allclose(one, other, rtol=1e-4):
                raise CutError(
                    f"its scores are scaled by {value.name}, which changes with the length: it "
                    f"differs at {sizes.total} tokens"
                )


def _head_shape(walk: Walk, context: MatchContext) -> AttentionShape:
    """Heads and sizes as the file states them; query heads also by running the keys' repeat."""
    kv_heads, head_size = _static_sizes(walk.key)
    value_heads, value_size = _static_sizes(walk.value)
    if kv_heads != value_heads:
        raise CutError(f"it has {kv_heads} key heads, but {value_heads} value heads")
    heads = _stated_query_heads(walk) or _repeated_heads(walk, context, kv_heads)
    return AttentionShape(heads, kv_heads, head_size, value_size)


def _stated_query_heads(walk: Walk) -> int | None:
    """Query heads as the file states them, for queries whose heads have axes of their own."""
    sizes = dict(zip(walk.query_axes, _known_sizes(walk.query), strict=False))
    heads, each = sizes.get("H"), sizes.get("R", 1)
    return heads * each if heads and each else None


def _repeated_heads(walk: Walk, context: MatchContext, kv_heads: int) -> int:
    """Heads of the keys where they meet the queries."""
    boundary = [value for value in (walk.key.value, walk.key.past) if value is not None]
    cut = cut_out(context.graph, boundary, [walk.key_operand])
    sizes = calls_for(walk.has_past)[0]
    inputs = ProbeInputs(context)
    (operand,) = run_cut(cut, inputs.feeds(cut, sizes, _random_heads(walk.key, inputs, sizes)))
    if operand.ndim != len(walk.axes):
        raise CutError(f"its keys have {operand.ndim} axes, not {len(walk.axes)}")
    count = int(np.prod(operand.shape[:-2])) // sizes.batch
    if len(walk.axes) == 5 and count == kv_heads:
        raise CutError(f"the file does not say how many heads the queries {walk.query.name} have")
    return count


def _static_sizes(heads: Heads) -> tuple[int, int]:
    """Heads and head size, from the cache or else from the new tokens."""
    for value in (heads.past, heads.value, heads.joined):
        sizes = dict(zip(heads.axes, _known_sizes(value), strict=False))
        count, size = sizes.get("H"), sizes.get("D")
        if count is not None and size is not None:
            return count, size
    raise CutError(f"the file does not say how many heads of which size {heads.value.name} has")


def _known_sizes(value: ir.Value | None) -> list[int | None]:
    """Sizes of a value's axes, from the file or from the constant of the Reshape that made it."""
    if value is not None and value.shape is not None:
        return [size if isinstance(size, int) else None for size in value.shape]
    reshape = producer_of(value, "Reshape")
    wanted = small_constant(reshape.inputs[1]) if reshape else None
    if wanted is None:
        return []
    return [int(size) if size > 0 else None for size in wanted.reshape(-1)]


def _boundary(
    walk: Walk, shape: AttentionShape, sizes: CallSizes
) -> dict[ir.Value, tuple[int, ...]]:
    """Shapes of scores (one head if that does), queries, and keys and values with their past."""
    shapes = _all_heads(walk, shape, sizes)
    if walk.one_head_does:
        one = {**_axis_sizes(shape, sizes, shape.head_size), "H": 1, "R": 1}
        shapes[walk.scores] = sizes_by_axis(walk.axes, one)
    return shapes


def _all_heads(
    walk: Walk, shape: AttentionShape, sizes: CallSizes
) -> dict[ir.Value, tuple[int, ...]]:
    axes = _axis_sizes(shape, sizes, shape.head_size)
    return {
        walk.scores: sizes_by_axis(walk.axes, axes),
        walk.query: sizes_by_axis(walk.query_axes, axes),
        **_heads_shapes(walk.key, sizes),
        **_heads_shapes(walk.value, sizes),
    }


def _axis_sizes(shape: AttentionShape, sizes: CallSizes, size: int) -> dict[str, int]:
    """Sizes by the letters of `Walk.axes`."""
    repeats = shape.num_heads // shape.kv_num_heads
    return {"B": sizes.batch, "H": shape.kv_num_heads, "R": repeats,
            "S": sizes.length, "T": sizes.total, "D": size}  # fmt: skip


def _heads_shapes(heads: Heads, sizes: CallSizes) -> dict[ir.Value, tuple[int, ...]]:
    """Shapes of the new tokens and the past of keys, or of values."""
    count, size = _static_sizes(heads)
    by_axis = {"B": sizes.batch, "H": count, "T": sizes.length, "D": size}
    shapes = {heads.value: tuple(by_axis[axis] for axis in heads.axes)}
    if heads.past is not None:
        by_axis["T"] = sizes.past
        shapes[heads.past] = tuple(by_axis[axis] for axis in heads.axes)
    return shapes


def _random_heads(heads: Heads, inputs: ProbeInputs, sizes: CallSizes) -> dict[ir.Value, Array]:
    """New tokens and past of keys, or of values."""
    shapes = _heads_shapes(heads, sizes)
    return {value: inputs.normal(*shape) for value, shape in shapes.items()}


@dataclass(frozen=True)
class _Probe:
    """The cut-out site and what is known of it before its scale."""

    walk: Walk
    context: MatchContext
    shape: AttentionShape
    mask: MaskClass
    cut: OpenCut

    def measure(self, sizes: CallSizes, loudness: float = 1.0) -> Measured:
        """What a call of these sizes shows; loud queries reach what clips their scores."""
        walk, inputs = self.walk, ProbeInputs(self.context)
        rows = (sizes.batch, self.shape.num_heads, sizes.length, self.shape.head_size)
        query = inputs.normal(*rows) * np.float32(loudness)
        keys = _random_heads(walk.key, inputs, sizes)
        values = _random_heads(walk.value, inputs, sizes)
        axes = _axis_sizes(self.shape, sizes, self.shape.head_size)
        given = {walk.query: query.reshape(sizes_by_axis(walk.query_axes, axes)), **keys, **values}
        results = self.cut.run(inputs.feeds(self.cut.cut, sizes, given))
        outputs, factors = results[: len(walk.outputs)], results[len(walk.outputs) :]
        scale, softcap = self._scale_and_softcap(factors)
        call = Call(
            query=_flat(query, "BHTD"),
            key=_flat(keys[walk.key.value], walk.key.axes),
            value=_flat(values[walk.value.value], walk.value.axes),
            past_key=self._past(walk.key, keys, sizes),
            past_value=self._past(walk.value, values, sizes),
            seqlens_k=np.full(sizes.batch, sizes.total - 1, np.int32),
            total_sequence_length=sizes.total,
            prompt_length=np.full(sizes.batch, NEVER_LAST, np.int32),
            first_valid=sizes.first_valid(),
        )
        attention = Attention(self.shape, pattern_of(self.mask), scale, softcap)
        tolerance = TOLERANCE if loudness == 1.0 else _LOUD_TOLERANCE
        index, layout = measured_output_layout(outputs, call, attention, tolerance)
        return Measured(attention, self.mask, index, layout)

    def _past(self, heads: Heads, given: dict[ir.Value, Array], sizes: CallSizes) -> Array:
        if heads.past is not None:
            return _in_order(given[heads.past], heads.axes, "BHTD")
        count, size = _static_sizes(heads)
        return np.zeros((sizes.batch, count, 0, size), np.float32)

    def _scale_and_softcap(self, factors: Sequence[Array]) -> tuple[float, float]:
        """`softcap * tanh(scale * x / softcap)`: the outer factors are the softcap."""
        inner = _product(self.walk.inner, factors)
        if self.walk.outer is None:
            return _snapped(inner, self.shape.head_size, self.context.roles.dtype), 0.0
        softcap = _product(self.walk.outer, factors[len(self.walk.inner) :])
        return _snapped(inner * softcap, self.shape.head_size, self.context.roles.dtype), softcap


def _product(factors: Sequence[Factor], values: Sequence[Array]) -> float:
    result = 1.0
    for factor, value in zip(factors, values, strict=False):
        if value.size != 1:
            raise CutError(f"its scores are scaled by {factor.value.name} of {value.size} elements")
        number = float(value.reshape(()))
        result = result / number if factor.divides else result * number
    return result


def _snapped(scale: float, head_size: int, dtype: ir.DataType) -> float:
    """`head_size**-0.5` where the file's number can only be a rounding of it."""
    default = head_size**-0.5
    rounding = _SCALE_ROUNDING.get(dtype, 1e-5)
    return default if math.isclose(scale, default, rel_tol=rounding) else scale


def _flat(heads: Array, axes: str) -> Array:
    """`[B, S, heads*D]` of heads whose axes are in this order."""
    rows = _in_order(heads, axes, "BTHD")
    return rows.reshape(rows.shape[0], rows.shape[1], -1)


def _in_order(heads: Array, axes: str, wanted: str) -> Array:
    return heads.transpose([axes.index(axis) for axis in wanted])
