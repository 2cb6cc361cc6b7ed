"""Takes caches and rows of a source into the form that the operator reads, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Layout
from trianglemix.exporter.graph.walk import dtype_of

_TO_OPERATOR: Final = {Layout.BSHD: (0, 2, 1, 3), Layout.BHDS: (0, 1, 3, 2)}
"""Orders of axes that turn a cache into `[B, G, T, D]`; each is its own inverse."""


def as_type(build: GraphBuilder, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """The value in the type that the operator computes in; None: it is already."""
    if dtype is None or dtype_of(value) == dtype:
        return value
    cast = build.cast(value, dtype)
    cast.type, cast.shape = ir.TensorType(dtype), _numbers(value.shape, None)
    return cast


def cache_in(
    build: GraphBuilder, cache: ir.Value, layout: Layout, dtype: ir.DataType | None
) -> ir.Value:
    """A past as `[B, G, P, D]` in the operator's type."""
    order = _TO_OPERATOR.get(layout)
    moved = cache if order is None else build.transpose(cache, *order)
    if order is not None:
        moved.type = cache.type
        moved.shape = _numbers(cache.shape, order)
    return as_type(build, moved, dtype)


def cache_out(
    build: GraphBuilder, present: ir.Value, like: ir.Value, layout: Layout,
    dtype: ir.DataType | None,
) -> ir.Value:  # fmt: skip
    """The operator's present in the layout and the type of the value that it replaces."""
    order, wanted = _TO_OPERATOR.get(layout), dtype_of(like)
    if dtype is not None and wanted is not None and wanted != dtype:
        present.type = ir.TensorType(dtype)
        present = build.cast(present, wanted)
    if order is None:
        return present
    if present.type is None:
        present.type = like.type
    return build.transpose(present, *order)


def _numbers(shape: ir.Shape | None, order: Sequence[int] | None) -> ir.Shape | None:
    """Sizes in another order, without symbols: two values of one symbol may share memory."""
    if shape is None:
        return None
    sizes = [shape[axis] for axis in order or range(len(shape))]
    return ir.Shape([size if isinstance(size, int) else None for size in sizes])
