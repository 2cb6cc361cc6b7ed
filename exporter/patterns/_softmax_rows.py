"""A decomposed attention's mask as rows: the piece between scores and weights, run for itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.exporter.attention.attention_probe import CallSizes, ShapesOf, heads_apart
from trianglemix.exporter.attention.cutout import CutError, CutRunError
from trianglemix.exporter.attention.mask_probe import measure_class
from trianglemix.exporter.attention.mask_rows import CutRows
from trianglemix.exporter.attention.sites import MaskClass, MatchContext
from trianglemix.exporter.patterns._softmax_reasons import why_uneven
from trianglemix.exporter.patterns._softmax_walk import Walk


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
        super().__init__(context, shapes_of, walk.weights, walk.has_past)
        self._scores = walk.scores

    def visible(self, sizes: CallSizes) -> BoolArray:
        """See `MaskRows.visible`."""
        weights = self._apart(sizes)
        visible: BoolArray = weights > 0
        reason = why_uneven(weights, sizes)
        if reason is not None:
            raise CutError(reason)
        return visible

    def weights(self, sizes: CallSizes, scores: Array) -> Array:
        """See `MaskRows.weights`."""
        shape = self._shapes_of(sizes)[self._scores]
        return self._apart(sizes, {self._scores: np.broadcast_to(scores, shape).copy()})

    def _apart(self, sizes: CallSizes, given: dict[ir.Value, Array] | None = None) -> Array:
        weights = self._run(sizes, given)
        apart = heads_apart(weights, sizes.batch)
        if apart.ndim != 4 or apart.shape[-2:] != (sizes.length, sizes.total):
            raise CutRunError(f"its weights have the shape {weights.shape}, not [B, H, S, T]")
        return apart
