"""`trianglemix::BlockSparseAttention`, as exported models hold it."""

from __future__ import annotations

from functools import partial
from typing import Final

from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.operators import add_function
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._own_operator import OwnOperatorPattern, dense_attention


class BlockSparseAttentionPattern(OwnOperatorPattern):
    """Anchors on the node."""

    name = "block_sparse_attention"
    anchors = frozenset({(contract.DOMAIN, OP_TYPE)})

    def example(self) -> Example:
        layer = partial(dense_attention, attention=BlockSparse(_example.SHAPE, BlockRule()))
        example = _example.build_example(layer, opset=17, domains=(contract.DOMAIN,))
        add_function(example.model, OP_TYPE)
        return example


PATTERN: Final = BlockSparseAttentionPattern()
