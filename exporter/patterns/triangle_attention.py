"""`trianglemix::TriangleAttention`, dense or triangle."""

from __future__ import annotations

from functools import partial
from typing import Final

from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, OP_TYPE
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._own_operator import OwnOperatorPattern, dense_attention


class TriangleAttentionPattern(OwnOperatorPattern):
    """Anchors on the node."""

    name = "triangle_attention"
    anchors = frozenset({(contract.DOMAIN, OP_TYPE)})

    def example(self) -> Example:
        layer = partial(dense_attention, attention=Attention(_example.SHAPE, DENSE_PATTERN))
        return _example.build_example(layer, opset=17, domains=(contract.DOMAIN,))


PATTERN: Final = TriangleAttentionPattern()
