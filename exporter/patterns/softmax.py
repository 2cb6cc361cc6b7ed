"""Attention decomposed into standard operators: product, mask, Softmax, product; any exporter's.

It starts at the Softmax and walks back loosely to the two products; then the site is cut out of
the graph and measured, so that a wrong guess becomes a refusal, never a wrong model.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.exporter.cutout import CutError
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._site_pattern import NotAttentionError, SitePattern
from trianglemix.exporter.patterns._softmax_measure import measure
from trianglemix.exporter.patterns._softmax_walk import walk_back, weighted_sum
from trianglemix.exporter.sites import (
    AttentionSite,
    Example,
    Layout,
    MatchContext,
    Operand,
)
from trianglemix.exporter.walk import Heads


class SoftmaxPattern(SitePattern):
    """Anchors on Softmax."""

    name = "softmax"
    anchors = frozenset({("", "Softmax")})

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        product = weighted_sum(node, context.content)
        if product is None:
            raise NotAttentionError("this Softmax weights no values: not an attention")
        walk = walk_back(node, product, context.content)
        if isinstance(walk, str):
            raise CutError(walk)
        measured = measure(walk, context)
        return AttentionSite(
            layer=-1,
            form=self.name,
            anchor=walk.softmax,
            shape=measured.attention.shape,
            scale=measured.attention.scale,
            softcap=measured.attention.softcap,
            mask=measured.mask,
            query=Operand(walk.query, Layout.BHSD),
            key=Operand(walk.key.value, _layout(walk.key)),
            value=Operand(walk.value.value, _layout(walk.value)),
            past=_pair(walk.key.past, walk.value.past),
            present=_pair(walk.key.joined, walk.value.joined),
            output=Operand(walk.outputs[measured.output_index], measured.output_layout),
        )

    def example(self) -> Example:
        return _example.build_example(_example.decomposed_attention, opset=18)


PATTERN: Final = SoftmaxPattern()


def _layout(heads: Heads) -> Layout:
    return Layout.BHSD if heads.axes == "BHTD" else Layout.BSHD


def _pair(key: ir.Value | None, value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    return None if key is None or value is None else (key, value)
