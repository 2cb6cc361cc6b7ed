"""Attention decomposed into standard operators: product, mask, Softmax, product; any exporter's.

It starts at the Softmax and walks back loosely to the two products; then the site is cut out of
the graph and measured, so that a wrong guess becomes a refusal, never a wrong model.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.attention.sites import (
    LAYOUTS,
    AttentionSite,
    Example,
    Layout,
    MatchContext,
    Operand,
)
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import dtype_of
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._site_pattern import NotAttentionError, SitePattern
from trianglemix.exporter.patterns._softmax_measure import measure
from trianglemix.exporter.patterns._softmax_walk import Walk, walk_back, weighted_sum


class SoftmaxPattern(SitePattern):
    """Anchors on Softmax."""

    name = "softmax"
    anchors = frozenset({("", "Softmax")})

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        product = weighted_sum(node, context.content)
        if product is None:
            raise NotAttentionError("this Softmax weights no values: not an attention")
        _check_axis(node)
        walk = walk_back(node, product, context.content)
        if isinstance(walk, str):
            raise CutError(walk)
        measured = measure(walk, context)
        attention = measured.attention
        build = context.builder(node)
        return AttentionSite(
            layer=-1,
            form=self.name,
            anchor=walk.softmax,
            shape=attention.shape,
            scale=attention.scale,
            softcap=attention.softcap,
            mask=measured.mask,
            query=Operand(_query(walk, attention.shape, build), Layout.BHSD),
            key=Operand(walk.key.value, LAYOUTS[walk.key.axes]),
            value=Operand(walk.value.value, LAYOUTS[walk.value.axes]),
            past=_pair(walk.key.past, walk.value.past),
            present=_pair(walk.key.joined, walk.value.joined),
            output=Operand(walk.outputs[measured.output_index], measured.output_layout),
            prologue=tuple(build.nodes),
            cache=(LAYOUTS[walk.key.axes], LAYOUTS[walk.value.axes]),
            dtype=dtype_of(walk.query_operand),
        )

    def example(self) -> Example:
        return _example.build_example(_example.decomposed_attention, opset=18)


PATTERN: Final = SoftmaxPattern()


def _check_axis(softmax: ir.Node) -> None:
    axis, axes = softmax.attributes.get_int("axis", -1), rank(softmax.outputs[0])
    if axis != -1 and axes is not None and axis + 1 != axes:
        raise CutError(f"its Softmax runs over axis {axis} of {axes}, not over the keys, the last")


def _query(walk: Walk, shape: AttentionShape, build: GraphBuilder) -> ir.Value:
    """The queries as `[B, H, S, D]`, their heads merged, or taken out of the batch."""
    if walk.query_axes == "BHSD":
        return walk.query
    heads, size = shape.num_heads, shape.head_size
    if walk.query_axes == "BHRSD":
        return build.reshape(walk.query, 0, heads, -1, size)
    return build.reshape(walk.query, -1, heads, build.dimension(walk.query, 1), size)


def _pair(key: ir.Value | None, value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    return None if key is None or value is None else (key, value)
