"""A decomposed attention's mask as rows: the piece between scores and weights, run for itself."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.cutout import Array, CutError
from trianglemix.exporter.mask_probe import Bools, measure_class, real_rows
from trianglemix.exporter.mask_rows import CutRows, ShapesOf
from trianglemix.exporter.patterns._softmax_walk import Walk
from trianglemix.exporter.probe import CallSizes
from trianglemix.exporter.sites import MaskClass, MatchContext

_UNIFORM: Final = 1e-3


def softmax_mask(walk: Walk, context: MatchContext, shapes_of: ShapesOf) -> MaskClass:
    """Mask class of a site; what layers share is measured once.

    Raises:
        CutError: neither causal nor causal with a sliding window, or it does not run.
    """
    rows = _SoftmaxRows(walk, context, shapes_of)
    if rows.key not in context.masks:
        context.masks[rows.key] = measure_class(rows, context.context_length)
    return context.masks[rows.key]


class _SoftmaxRows(CutRows):
    """The piece from the scores to the softmax's weights. See `MaskRows`."""

    def __init__(self, walk: Walk, context: MatchContext, shapes_of: ShapesOf) -> None:
        super().__init__(context, shapes_of, walk.softmax.outputs[0], walk.has_past)
        self._scores = walk.scores

    def visible(self, sizes: CallSizes) -> Bools:
        """See `MaskRows.visible`."""
        weights = self._apart(sizes)
        visible: Bools = weights > 0
        count = visible.sum(axis=-1, keepdims=True)
        error = np.where(visible & real_rows(sizes), np.abs(weights * count - 1), 0.0)
        if not error.max() <= _UNIFORM:
            b, h, row, key = (int(x) for x in np.argwhere(error > _UNIFORM)[0])
            raise CutError(
                "its scores get more than a mask (a bias by position, as ALiBi has it, or sinks in "
                f"the softmax): at equal scores row {sizes.past + row} of {sizes.total} tokens "
                f"weighs key {key} by {weights[b, h, row, key]:.3g}, not by one in "
                f"{int(count[b, h, row, 0])}"
            )
        return visible

    def weights(self, sizes: CallSizes, scores: Array) -> Array:
        """See `MaskRows.weights`."""
        shape = self._shapes_of(sizes)[self._scores]
        return self._apart(sizes, {self._scores: np.broadcast_to(scores, shape).copy()})

    def _apart(self, sizes: CallSizes, given: dict[ir.Value, Array] | None = None) -> Array:
        weights = self._run(sizes, given)
        apart = _heads_apart(weights, sizes.batch)
        if apart.ndim != 4 or apart.shape[-2:] != (sizes.length, sizes.total):
            raise CutError(f"its weights have the shape {weights.shape}, not [B, H, S, T]")
        return apart


def _heads_apart(weights: Array, batch: int) -> Array:
    """`[B, H, S, T]` of weights whose heads are one axis with the batch, or two axes."""
    if weights.ndim in (3, 5) and math.prod(weights.shape[:-2]) % batch == 0:
        return weights.reshape(batch, -1, *weights.shape[-2:])
    return weights
