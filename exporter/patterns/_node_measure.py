"""Measures an attention that is one node: its mask, and whether its numbers are attention's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention
from trianglemix.exporter.attention.attention_probe import (
    TOLERANCE,
    CallSizes,
    ProbeInputs,
    calls_for,
    measured_output_layout,
    pattern_of,
)
from trianglemix.exporter.attention.cutout import CutError, CutOut, OpenCut, cut_out
from trianglemix.exporter.attention.mask_probe import Expected
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Layout,
    MaskClass,
    MatchContext,
    Operand,
)
from trianglemix.exporter.graph.attention_node import NEVER_LAST
from trianglemix.exporter.graph.walk import layout_chain
from trianglemix.exporter.patterns._lengths import full_lengths
from trianglemix.exporter.patterns._node_mask import (
    Bounds,
    has_mask_operand,
    leave_unspecified_out,
    node_mask,
)

_MAX_WHOLE: Final = 600  # keys of a window that the whole node is run beyond
_UNIFORM: Final = 1e-3
"""How far, relatively, equal scores may give unequal weights."""


def measured(site: AttentionSite, context: MatchContext) -> AttentionSite:
    """The site with its mask, and where its result stands, as a run of its node tells them.

    Raises:
        CutError: it is not attention as the operator means it, or it does not run.
    """
    outputs = layout_chain(site.anchor.outputs[0])
    given = [site.query.value, site.key.value, site.value.value, *(site.past or ())]
    inside = [x for x in site.present or () if x.producer() is site.anchor]
    cut = cut_out(context.graph, given, [*outputs, *inside])
    stated = Bounds.of(site.anchor)
    runs, softcap = leave_unspecified_out(cut, stated, site.softcap)
    probe = _Probe(replace(site, softcap=softcap), context, len(outputs), cut)
    mask = probe.mask(stated)
    ran = mask if runs == stated else probe.mask(runs)
    probe.check_weights(ran)
    found = {probe.compare(ran, sizes) for sizes in probe.calls()}
    if len(found) > 1:
        raise CutError("the layout of its output changes from call to call")
    index, layout = found.pop()
    site = replace(site, mask=mask, output=Operand(outputs[index], layout))
    if has_mask_operand(site.anchor):
        return site
    build = context.builder(site.anchor)
    lengths = full_lengths(context, build)
    return replace(site, lengths=lengths, prologue=(*site.prologue, *build.nodes))


@dataclass(frozen=True)
class _Heads:
    """Arrays `[B, heads, tokens, size]` for one call."""

    query: Array
    key: Array
    value: Array
    past_key: Array
    past_value: Array


class _Probe:
    """The cut-out node and the values to run it on; `count` results come before the presents."""

    def __init__(self, site: AttentionSite, context: MatchContext, count: int, cut: CutOut) -> None:
        self._site = site
        self._context = context
        self._count = count
        self._inputs = ProbeInputs(context)
        self._open = OpenCut(cut)
        self._padded = has_mask_operand(site.anchor)

    def mask(self, bounds: Bounds) -> MaskClass:
        """What its mask operands and these bounds say at every length."""
        return node_mask(self._site, self._context, self._shapes, bounds)

    def check_weights(self, mask: MaskClass) -> None:
        """The whole node at short lengths must have this mask and nothing besides.

        At equal scores a weight is 0 or the same for every key that a row sees. Values that are
        one-hot in the token (a block of `Dv` tokens at a time) make the output those weights,
        whatever the node's mask is made of.
        """
        for sizes in self._far_calls(mask):
            block = self._site.shape.value_head_size
            parts = [self._weights(sizes, start) for start in range(0, sizes.total, block)]
            weights = np.concatenate(parts, axis=-1)[..., : sizes.total]
            visible = weights > 0
            self._check_uniform(weights, visible)
            Expected(mask.window).check(visible, sizes)

    def calls(self) -> list[CallSizes]:
        """The calls every site is measured with, without padding where nothing could hide it."""
        calls = calls_for(self._site.past is not None)
        return [call if self._padded else replace(call, pads=0) for call in calls]

    def _far_calls(self, mask: MaskClass) -> list[CallSizes]:
        near = [29] if mask.window is None or mask.window > _MAX_WHOLE else [mask.window + 5]
        limit, pads = mask.seen_to or _MAX_WHOLE, 2 if self._padded else 0
        if self._site.past is not None:
            return [CallSizes(2, 3, min(total, limit - 3), pads=pads) for total in near]
        return [CallSizes(2, min(total, limit), 0, pads=pads) for total in near]

    def compare(self, mask: MaskClass, sizes: CallSizes) -> tuple[int, Layout]:
        """The node's numbers against the reference's, on random heads; its presents too.

        Returns which of the site's outputs holds the result, and its layout.
        """
        heads = self._heads(self._inputs.normal, sizes)
        results = self._run(heads, sizes)
        outputs, present = results[: self._count], results[self._count :]
        call = Call(
            query=_rows(heads.query),
            key=_rows(heads.key),
            value=_rows(heads.value),
            past_key=heads.past_key,
            past_value=heads.past_value,
            seqlens_k=np.full(sizes.batch, sizes.total - 1, np.int32),
            total_sequence_length=sizes.total,
            prompt_length=np.full(sizes.batch, NEVER_LAST, np.int32),
            first_valid=sizes.first_valid(),
        )
        site = self._site
        attention = Attention(site.shape, pattern_of(mask), site.scale, site.softcap)
        found = measured_output_layout(outputs, call, attention)
        for ours, theirs in zip(triangle_attention(call, attention)[1:], present, strict=False):
            if ours.shape != theirs.shape or np.abs(ours - theirs).max() > TOLERANCE:
                raise CutError("its present is not its past with the new tokens appended")
        return found

    def _weights(self, sizes: CallSizes, start: int) -> Array:
        """`[B, H, S, Dv]`: weights of the keys `start` to `start + Dv`, at equal scores."""
        heads = self._heads(self._inputs.normal, sizes)
        shape = self._site.shape
        hot = np.eye(sizes.total, shape.value_head_size, -start, np.float32)
        values = np.broadcast_to(hot, (sizes.batch, shape.kv_num_heads, *hot.shape))
        equal = _Heads(
            np.zeros_like(heads.query),
            np.zeros_like(heads.key),
            np.ascontiguousarray(values[:, :, sizes.past :]),
            np.zeros_like(heads.past_key),
            np.ascontiguousarray(values[:, :, : sizes.past]),
        )
        output = self._run(equal, sizes)[0]
        if output.ndim == 4:
            return output
        apart = output.reshape(sizes.batch, sizes.length, shape.num_heads, -1)
        return apart.transpose(0, 2, 1, 3)

    @staticmethod
    def _check_uniform(weights: Array, visible: NDArray[np.bool_]) -> None:
        count = visible.sum(axis=-1, keepdims=True)
        error = np.where(visible, np.abs(weights * count - 1), 0.0).max()
        if not error <= _UNIFORM:
            raise CutError(
                "its scores get more than a mask (an attention bias, or sinks in the softmax): "
                f"equal scores give weights that differ by {error:.1e} of their mean"
            )

    def _heads(self, make: Callable[..., Array], sizes: CallSizes) -> _Heads:
        """Arrays for one call, each made of its shape."""
        shape = self._site.shape
        kv = (sizes.batch, shape.kv_num_heads)
        return _Heads(
            make(sizes.batch, shape.num_heads, sizes.length, shape.head_size),
            make(*kv, sizes.length, shape.head_size),
            make(*kv, sizes.length, shape.value_head_size),
            make(*kv, sizes.past, shape.head_size),
            make(*kv, sizes.past, shape.value_head_size),
        )

    def _run(self, heads: _Heads, sizes: CallSizes) -> Sequence[Array]:
        given = self._laid_out(heads)
        return self._open.run(self._inputs.feeds(self._open.cut, sizes, given))

    def _laid_out(self, heads: _Heads) -> dict[ir.Value, Array]:
        """The values at which the piece begins, as the node takes them."""
        site = self._site
        given = {
            site.query.value: _in_layout(heads.query, site.query.layout),
            site.key.value: _in_layout(heads.key, site.key.layout),
            site.value.value: _in_layout(heads.value, site.value.layout),
        }
        if site.past is not None:
            pasts = (heads.past_key, heads.past_value)
            for value, past, layout in zip(site.past, pasts, site.cache, strict=True):
                given[value] = _in_layout(past, layout)
        return given

    def _shapes(self, sizes: CallSizes) -> dict[ir.Value, tuple[int, ...]]:
        """Their shapes."""
        heads = self._heads(lambda *shape: np.broadcast_to(np.float32(0), shape), sizes)
        return {x: array.shape for x, array in self._laid_out(heads).items()}


def _rows(heads: Array) -> Array:
    """`[B, S, heads*D]` of `[B, heads, S, D]`."""
    return _in_layout(heads, Layout.FLAT)


def _in_layout(heads: Array, layout: Layout) -> Array:
    if layout is Layout.BHSD:
        return heads
    if layout is Layout.BHDS:
        return heads.transpose(0, 1, 3, 2)
    rows = heads.transpose(0, 2, 1, 3)
    return rows if layout is Layout.BSHD else rows.reshape(*rows.shape[:2], -1)
