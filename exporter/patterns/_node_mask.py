"""The mask of an attention node as rows: what its operands and attributes hide, at every length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.exporter.attention.attention_probe import CallSizes, ShapesOf
from trianglemix.exporter.attention.cutout import CutError, CutOut, CutRunError
from trianglemix.exporter.attention.mask_probe import measure_class, real_rows
from trianglemix.exporter.attention.mask_rows import CutRows
from trianglemix.exporter.attention.sites import AttentionSite, MaskClass, MatchContext
from trianglemix.exporter.graph.ort import import_onnxruntime
from trianglemix.exporter.graph.walk import is_op, optional_input

_HIDDEN: Final = -5e3
"""An additive mask hides what it lowers by more: the smallest in use is -1e4."""
_CAUSAL: Final = {"Attention": "is_causal", "MultiHeadAttention": "unidirectional"}
_UNBOUNDED: Final = -1
_WINDOWS_SINCE: Final = (1, 32)  # before, the attributes of opset 25 are refused
_SOFTCAP_SINCE: Final = (1, 27)  # before, it is applied after the mask, and hidden keys count


@dataclass(frozen=True)
class Bounds:
    """How many keys before and after its own a row may see by a node's attributes; None for all.

    The attributes are those of `Attention` since opset 25. A row's own key counts besides.
    """

    left: int | None = None
    right: int | None = None

    @classmethod
    def of(cls, node: ir.Node) -> Bounds:
        """What the attributes say; the one that lets a row see no later key is a bound of 0."""
        left, right = (
            node.attributes.get_int(name, _UNBOUNDED) for name in (LEFT_WINDOW, RIGHT_WINDOW)
        )
        if node.attributes.get_int(_CAUSAL[node.op_type], 0):
            right = 0
        return cls(*(None if size == _UNBOUNDED else size for size in (left, right)))

    def visible(self, sizes: CallSizes, first: int) -> BoolArray:
        """`[S, T]`; the first of the new tokens counts as the position `first`."""
        i, j = first + np.arange(sizes.length)[:, None], np.arange(sizes.total)[None]
        shown = np.ones((sizes.length, sizes.total), np.bool_)
        if self.left is not None:
            shown &= j >= i - self.left
        if self.right is not None:
            shown &= j <= i + self.right
        return shown


LEFT_WINDOW: Final = "left_window_size"
RIGHT_WINDOW: Final = "right_window_size"


def has_mask_operand(node: ir.Node) -> bool:
    """Whether something besides the node's attributes hides keys: padding, for one."""
    return any(optional_input(node, index) is not None for index, _ in _OPERANDS[node.op_type])


def node_mask(
    site: AttentionSite, context: MatchContext, shapes_of: ShapesOf, bounds: Bounds
) -> MaskClass:
    """Class of a node's mask as its operands and these bounds make it.

    Without an operand the node is taken for causal, which a run of it must confirm.

    Raises:
        CutError: neither causal nor causal with a sliding window, or it does not run.
    """
    node = site.anchor
    operands = [
        (value, reads)
        for index, reads in _OPERANDS[node.op_type]
        if (value := optional_input(node, index)) is not None
    ]
    if bounds.right:
        raise CutError(f"a row sees {bounds.right} keys after its own ({RIGHT_WINDOW})")
    _check_start(site, bounds)
    if not operands:
        return _stated(bounds)
    parts = [_OperandRows(context, shapes_of, site, *operand) for operand in operands]
    rows = _NodeRows(site, parts, bounds)
    if rows.key not in context.masks:
        context.masks[rows.key] = measure_class(rows, context.context_length)
    return context.masks[rows.key]


def _check_start(site: AttentionSite, bounds: Bounds) -> None:
    """Raises CutError where bounds count from the first new token though there is a past."""
    if bounds == Bounds() or site.past is None or _is_inside(site):
        return
    name = LEFT_WINDOW if bounds.left is not None else _CAUSAL[site.anchor.op_type]
    raise CutError(
        f"its {name} counts from the first new token, since its cache is joined before "
        "the node; export with the cache inside it (past_key and past_value)"
    )


def _stated(bounds: Bounds) -> MaskClass:
    """Class of a mask that the node's attributes alone make."""
    if bounds.left is None:
        return MaskClass()
    if bounds.right is None:
        raise CutError(f"it has a {LEFT_WINDOW}, but is not causal: a row sees every later key")
    return MaskClass(bounds.left + 1)


class _OperandRows(CutRows):
    """One mask operand of a node."""

    def __init__(
        self,
        context: MatchContext,
        shapes_of: ShapesOf,
        site: AttentionSite,
        operand: ir.Value,
        reads: Callable[[Array, CallSizes], BoolArray],
    ) -> None:
        super().__init__(context, shapes_of, operand, site.past is not None)
        self._reads = reads

    @property
    def key(self) -> tuple[object, ...]:
        """See `CutRows.key`."""
        return (*super().key, self._reads.__name__)

    def visible(self, sizes: CallSizes) -> BoolArray:
        """See `MaskRows.visible`."""
        return self._reads(self._run(sizes), sizes)


class _NodeRows:
    """All that hides keys from a node's rows. See `MaskRows`."""

    def __init__(self, site: AttentionSite, parts: list[_OperandRows], bounds: Bounds) -> None:
        self.has_past = site.past is not None
        self._parts = parts
        self._bounds = bounds
        self._counts_past = _is_inside(site)
        self.key = (*(part.key for part in parts), bounds, self.has_past, self._counts_past)
        self.numbers = {number for part in parts for number in part.numbers}
        if bounds.left is not None:
            self.numbers |= {bounds.left, bounds.left + 1}

    @property
    def grows_square(self) -> bool:
        """See `MaskRows.grows_square`."""
        return any(part.grows_square for part in self._parts)

    @property
    def by_content(self) -> str | None:
        """See `MaskRows.by_content`."""
        return next((x for part in self._parts if (x := part.by_content) is not None), None)

    def visible(self, sizes: CallSizes) -> BoolArray:
        """See `MaskRows.visible`."""
        shown = self._bounds.visible(sizes, sizes.past if self._counts_past else 0)[None, None]
        for part in self._parts:
            shown = shown & part.visible(sizes)
        whole = (max(sizes.batch, shown.shape[0]), shown.shape[1], sizes.length, sizes.total)
        return np.broadcast_to(shown, whole)

    def weights(self, sizes: CallSizes, scores: Array) -> Array | None:
        """A mask operand makes no weights of scores."""
        return None


def _is_inside(site: AttentionSite) -> bool:
    """Whether a node knows how long its past is: it appends to the cache itself.

    Where the cache is joined before it, the bounds of `Attention` count from the first new token.
    `MultiHeadAttention` counts from the end of the keys.
    """
    node = site.anchor
    joins = any(value is not None and value in node.inputs for value in site.past or ())
    return joins or node.op_type != "Attention"


def _shown(mask: Array, sizes: CallSizes) -> BoolArray:
    """Which keys a mask shows that is added to the scores, or bool."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[-2] not in (1, sizes.length) or mask.shape[-1] != sizes.total:
        raise CutRunError(f"its mask has the shape {mask.shape}, not [B, H, S, T]")
    shown: BoolArray = mask if mask.dtype == np.bool_ else mask > _HIDDEN
    if mask.dtype != np.bool_:
        biased = shown & (np.abs(mask) > 0) & real_rows(sizes)
        if biased.any():
            raise CutError(
                "its scores get more than a mask (an attention bias): its operand adds "
                f"{np.broadcast_to(mask, biased.shape)[biased][0]:.3g} to the score of a key"
            )
    return shown


def _shown_by_key(mask: Array, sizes: CallSizes) -> BoolArray:
    """Which keys a `key_padding_mask` shows: `[B]` (how many), `[B, T]` or `[B, S, T]`."""
    if mask.shape == (sizes.batch,):
        real: BoolArray = np.arange(sizes.total) < mask[:, None]
        return real[:, None, None]
    if mask.ndim not in (2, 3) or mask.shape[-1] != sizes.total:
        raise CutRunError(
            f"its key_padding_mask has the shape {mask.shape}, not [B, T] or [B, S, T]"
        )
    shown: BoolArray = mask > 0
    return shown[:, None, None] if mask.ndim == 2 else shown[:, None]


_OPERANDS: Final = {
    "Attention": ((3, _shown),),
    "MultiHeadAttention": ((4, _shown_by_key), (5, _shown)),
}


def leave_unspecified_out(cut: CutOut, bounds: Bounds, softcap: float) -> tuple[Bounds, float]:
    """Takes out of a piece's `Attention` what the installed ONNX Runtime computes otherwise.

    Such things are stated by the specification: what a source means must not depend on the version
    that measures it. Returns the bounds and the softcap that the piece then has.
    """
    installed = tuple(int(x) for x in import_onnxruntime().__version__.split(".")[:2])
    for node in cut.model.graph:
        if not is_op(node, "Attention"):
            continue
        if installed < _WINDOWS_SINCE and {LEFT_WINDOW, RIGHT_WINDOW} & set(node.attributes):
            node.attributes.pop(LEFT_WINDOW, None)
            node.attributes.pop(RIGHT_WINDOW, None)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", int(bounds.right == 0))
            bounds = Bounds(right=bounds.right)
        if installed < _SOFTCAP_SINCE:
            node.attributes.pop("softcap", None)
            softcap = 0.0
    return bounds, softcap
