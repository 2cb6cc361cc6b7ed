"""The roles that a layer may have beside dense, and what its rows keep in each."""

from __future__ import annotations

from typing import Final

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern

Keeps = TrianglePattern | BlockRule
"""What says which keys a row keeps. All layers of one role share one."""
TRIANGLE: Final = "triangle"
BLOCK_SPARSE: Final = "block_sparse"
ROLES: Final = (TRIANGLE, BLOCK_SPARSE)


def role_of(keeps: Keeps) -> str:
    """The role of layers whose rows keep so."""
    return TRIANGLE if isinstance(keeps, TrianglePattern) else BLOCK_SPARSE
