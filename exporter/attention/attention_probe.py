"""Measures an attention cut out of its graph: mask class, scale, and whether the numbers agree.

Nothing here reads a weight: queries, keys and values are random. The measured site must equal
`custom_ops.triangle.reference`, which is what makes a loose match of the graph's shape safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention
from trianglemix.exporter.attention.cutout import CutError, CutOut
from trianglemix.exporter.attention.input_kinds import classify
from trianglemix.exporter.attention.sites import Layout, MaskClass, MatchContext
from trianglemix.exporter.graph.roles import GraphRoles, is_score_mask
from trianglemix.manifest.feeds import Call as FedCall
from trianglemix.manifest.feeds import call_feeds

TOLERANCE: Final = 1e-4
_SMALL_VOCABULARY: Final = 1000
_MAX_ELEMENTS: Final = 1 << 24  # of a value of which only the shape is asked
_HALF: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_COUNTED: Final = ("position_ids", "cache_position", "past_length", "total_length", "beam_idx")


@dataclass(frozen=True)
class CallSizes:
    """One call of a decoder: batch, new tokens, past tokens, pads on both sides of the last row.

    `segments`: what attention_mask holds in the first half of the tokens and in the second, as
    documents packed into one row may be numbered; `restarts`: the second half counts its
    positions from 0 again.
    """

    batch: int
    length: int
    past: int
    pads: int = 0
    right_pads: int = 0
    segments: tuple[int, int] = (1, 1)
    restarts: bool = False

    @property
    def total(self) -> int:
        return self.past + self.length

    @property
    def half(self) -> int:
        """Where the second half of the tokens begins."""
        return self.total // 2

    def positions(self) -> NDArray[np.int64]:
        """`[B, S]` of the new tokens, counted as callers do: from a row's first real token."""
        slots = np.arange(self.past, self.total)
        if self.restarts:
            slots = np.where(slots >= self.half, slots - self.half, slots)
        return np.maximum(slots - self.first_valid()[:, None].astype(np.int64), 0)

    def first_valid(self) -> NDArray[np.int32]:
        first = np.zeros(self.batch, np.int32)
        first[-1] = self.pads
        return first

    def row_end(self) -> NDArray[np.int32]:
        """Slot after each row's last token."""
        end = np.full(self.batch, self.total, np.int32)
        end[-1] -= self.right_pads
        return end


_WITH_PAST: Final = (CallSizes(2, 5, 7), CallSizes(3, 6, 4, pads=2), CallSizes(2, 1, 9))
_PROMPT: Final = CallSizes(2, 11, 0, pads=3)


def calls_for(has_past: bool) -> tuple[CallSizes, ...]:
    """The calls every site is measured with."""
    return (*_WITH_PAST, _PROMPT) if has_past else (_PROMPT, CallSizes(3, 7, 0))


def pattern_of(mask: MaskClass) -> TrianglePattern:
    """The operator's parameters that give this mask, with `prompt_length = NEVER_LAST`."""
    return DENSE_PATTERN if mask.window is None else TrianglePattern(0, mask.window, 1)


class ProbeInputs:
    """Values for a piece's inputs: the graph's own by their role, the rest by their shape."""

    def __init__(self, context: MatchContext, seed: int = 0) -> None:
        self._roles = context.roles
        self._graph = context.graph
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Array:
        """Unit-normal float32 numbers."""
        return self._random.standard_normal(shape, np.float32)

    def feeds(
        self, cut: CutOut, sizes: CallSizes, given: Mapping[ir.Value, Array]
    ) -> dict[ir.Value, Array]:
        """A value for every input of the piece.

        Raises:
            CutError: an input of the graph whose meaning is not known takes part.
        """
        return {
            value: given[value] if value in given else self._value_of(value, cut, sizes)
            for value in cut.inputs
        }

    def _value_of(self, value: ir.Value, cut: CutOut, sizes: CallSizes) -> Array:
        roles = self._roles
        if value is roles.attention_mask:
            mask = np.full((sizes.batch, sizes.total), sizes.segments[1])
            mask[:, : sizes.half] = sizes.segments[0]
            mask[-1, : sizes.pads] = 0
            mask[-1, sizes.total - sizes.right_pads :] = 0
            return mask.astype(_numpy_dtype(value))
        if value is roles.input_ids:
            return self._ids(cut, sizes).astype(_numpy_dtype(value))
        counted = self._counted(value, sizes)
        if counted is not None:
            return counted
        if value in roles.caches:
            return _zeros(self._shape_of(value, sizes, sizes.past), np.dtype(np.float32))
        if value in cut.shape_only:
            return _zeros(self._shape_of(value, sizes, sizes.length), _numpy_dtype(value))
        if is_score_mask(value):
            raise CutError(
                f"what it hides is told from outside, for each row and key, by {value.name} "
                f"{value.shape}: it may be anything; export with attention_mask [batch, length] "
                "alone"
            )
        raise CutError(f"its mask depends on {value.name}, whose meaning is not known")

    def _counted(self, value: ir.Value, sizes: CallSizes) -> Array | None:
        """The value of an input that only counts tokens or rows; None for any other."""
        if not value.is_graph_input():
            return None
        known = classify(value, self._graph, self._roles)
        if known.role not in _COUNTED:
            return None
        ids = np.zeros((sizes.batch, sizes.length), np.int64)
        mask = np.ones((sizes.batch, sizes.total))
        return call_feeds([known], FedCall(ids, mask, sizes.positions()))[known.name]

    def _ids(self, cut: CutOut, sizes: CallSizes) -> Array:
        """Random tokens; every second one is a number that stands in the piece, or nearly is."""
        shape = (sizes.batch, sizes.length)
        vocabulary = _vocabulary(self._roles)
        ids = self._random.integers(0, vocabulary, shape)
        named = [
            number + step
            for number in sorted(cut.constants() | {0, 1})
            for step in (0, 1)
            if number + step < vocabulary
        ]
        chosen = self._random.choice(named, shape) if named else ids
        return np.where(self._random.random(shape) < 0.5, chosen, ids)

    def _shape_of(self, value: ir.Value, sizes: CallSizes, tokens: int) -> list[int]:
        """Static sizes as they are, the first other one the batch, later ones `tokens`."""
        return [
            size if isinstance(size, int) else (sizes.batch if axis == 0 else tokens)
            for axis, size in enumerate((None, None, 8) if value.shape is None else value.shape)
        ]


def _vocabulary(roles: GraphRoles) -> int:
    size = roles.logits.shape[-1] if roles.logits.shape else None
    return size if isinstance(size, int) and size > 1 else _SMALL_VOCABULARY


def _zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Zeros of which a mask asks the shape alone; a file that names no axis makes it too large."""
    if math.prod(shape) > _MAX_ELEMENTS:
        shape = [*shape[:-1], 0]
    return np.zeros(shape, dtype)


def _numpy_dtype(value: ir.Value) -> np.dtype[Any]:
    dtype = value.dtype
    if dtype is None or dtype in _HALF:
        return np.dtype(np.float32)
    return np.dtype(dtype.numpy())


ShapesOf = Callable[[CallSizes], dict[ir.Value, tuple[int, ...]]]
"""Shapes, in a call, of the values at which a piece may begin."""


def heads_apart(weights: Array, batch: int) -> Array:
    """`[B, H, S, T]` of weights whose heads are one axis with the batch, or two axes."""
    if weights.ndim in (3, 5) and math.prod(weights.shape[:-2]) % batch == 0:
        return weights.reshape(batch, -1, *weights.shape[-2:])
    return weights


def measured_output_layout(
    outputs: Sequence[Array], call: Call, attention: Attention, tolerance: float = TOLERANCE
) -> tuple[int, Layout]:
    """Index and layout of the last of `outputs` that holds the attention's result.

    Raises:
        CutError: none does; the message says how far off the numbers are.
    """
    expected = triangle_attention(call, attention)[0]
    rows = _real_rows(call)
    best = np.inf
    for index in range(len(outputs) - 1, -1, -1):
        for layout, flat in _readings(outputs[index], attention.shape):
            if flat.shape != expected.shape:
                continue
            scale = max(1.0, float(np.abs(expected).max()))
            error = float(np.abs(flat - expected)[rows].max()) / scale
            if error <= tolerance:
                return index, layout
            best = min(best, error)
    raise CutError(
        f"its numbers differ from attention's by {best:.1e} (allowed: {tolerance:.0e})"
        if np.isfinite(best)
        else "no output of it has the shape of attention's result"
    )


def _real_rows(call: Call) -> NDArray[np.bool_]:
    """`[B, S]`: rows that are not left padding."""
    batch, length = call.query.shape[:2]
    first = np.zeros(batch) if call.first_valid is None else call.first_valid
    position = call.total_sequence_length - length + np.arange(length)
    rows: NDArray[np.bool_] = position[None] >= first[:, None]
    return rows


def _readings(output: Array, shape: AttentionShape) -> list[tuple[Layout, Array]]:
    """The output as `[B, S, H*Dv]`, by each layout that its rank allows."""
    if output.ndim == 3:
        return [(Layout.FLAT, output)]
    if output.ndim != 4:
        return []
    batch = output.shape[0]
    return [
        (Layout.BSHD, output.reshape(batch, output.shape[1], -1)),
        (Layout.BHSD, output.transpose(0, 2, 1, 3).reshape(batch, output.shape[2], -1)),
    ]
