"""The mask operand of an attention node as rows: what the graph gives the node, at every length."""

from __future__ import annotations

from typing import Final

import numpy as np
from trianglemix.exporter.cutout import Array, CutError
from trianglemix.exporter.mask_probe import Bools, measure_class, real_rows
from trianglemix.exporter.mask_rows import CutRows
from trianglemix.exporter.probe import CallSizes, ShapesOf
from trianglemix.exporter.sites import AttentionSite, MaskClass, MatchContext
from trianglemix.exporter.walk import optional_input

_OPERAND: Final = {"Attention": 3, "MultiHeadAttention": 5}
_CAUSAL: Final = {"Attention": "is_causal", "MultiHeadAttention": "unidirectional"}
_HIDDEN: Final = -5e3
"""An additive mask hides what it lowers by more: the smallest in use is -1e4."""


def operand_mask(site: AttentionSite, context: MatchContext, shapes_of: ShapesOf) -> MaskClass:
    """Class of a node's mask as its operand and its attribute make it.

    Without an operand the node is taken for causal, which a run of it must confirm.

    Raises:
        CutError: neither causal nor causal with a sliding window, or it does not run.
    """
    node = site.anchor
    operand = optional_input(node, _OPERAND.get(node.op_type, len(node.inputs)))
    if operand is None:
        return MaskClass()
    causal = bool(node.attributes.get_int(_CAUSAL[node.op_type], 0))
    rows = _OperandRows(context, shapes_of, operand, site.past is not None)
    rows.causal = causal
    if rows.key not in context.masks:
        context.masks[rows.key] = measure_class(rows, context.context_length)
    return context.masks[rows.key]


class _OperandRows(CutRows):
    """A mask that is added to the scores, or bool. See `MaskRows`.

    `causal`: the node lets no row see a later key, whatever the operand says.
    """

    causal = False

    @property
    def key(self) -> tuple[object, ...]:
        """See `CutRows.key`."""
        return (*super().key, self.causal)

    def visible(self, sizes: CallSizes) -> Bools:
        """See `MaskRows.visible`."""
        mask = self._run(sizes)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if mask.shape[-2] not in (1, sizes.length) or mask.shape[-1] != sizes.total:
            raise CutError(f"its mask has the shape {mask.shape}, not [B, H, S, T]")
        shown: Bools = mask if mask.dtype == np.bool_ else mask > _HIDDEN
        if mask.dtype != np.bool_:
            biased = shown & (np.abs(mask) > 0) & real_rows(sizes)
            if biased.any():
                raise CutError(
                    "its scores get more than a mask (an attention bias): its operand adds "
                    f"{np.broadcast_to(mask, biased.shape)[biased][0]:.3g} to the score of a key"
                )
        if self.causal:
            i, j = np.arange(sizes.past, sizes.total)[:, None], np.arange(sizes.total)[None]
            shown = shown & (j <= i)
        whole = (max(sizes.batch, shown.shape[0]), shown.shape[1], sizes.length, sizes.total)
        return np.broadcast_to(shown, whole)

    def weights(self, sizes: CallSizes, scores: Array) -> Array | None:
        """A mask operand makes no weights of scores."""
        return None
