"""Finds what counts positions from the cache's length, for models without position_ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.graph.walk import constant_array, is_op
from trianglemix.exporter.targets.ascend.static_shapes import evaluate

_MOST_NODES: Final = 60
_ROWS: Final = 5
_LARGEST_CONSTANT: Final = 2**10
_STARTS: Final = (0, 3, 11)


def find_position_ranges(graph: ir.Graph, roles: GraphRoles) -> Iterator[tuple[ir.Value, Any]]:
    """Outputs of Range nodes that are the new rows' positions, and their NumPy types.

    What a Range gives is computed for several lengths of mask and token ids, on which alone it may
    depend: it counts positions if it gives `start .. start + S - 1` for all of them.
    """
    opsets = [onnx.helper.make_opsetid("", graph.opset_imports[""])]
    for node in list(graph):
        if not is_op(node, "Range"):
            continue
        nodes = _behind(node, roles)
        if nodes is None:
            continue
        results = [_computed(nodes, node, roles, opsets, start) for start in _STARTS]
        wanted = (np.arange(start, start + _ROWS) for start in _STARTS)
        if all(
            r is not None and np.array_equal(r, w) for r, w in zip(results, wanted, strict=True)
        ):
            assert results[0] is not None
            yield node.outputs[0], results[0].dtype


def _behind(last: ir.Node, roles: GraphRoles) -> list[ir.Node] | None:
    """The nodes that make it, in order; None if it reads more than lengths and constants."""
    found: dict[ir.Node, None] = {}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node.domain not in ("", "ai.onnx") or len(found) > _MOST_NODES:
            return None
        found[node] = None
        for value in node.inputs:
            if value is None or value.const_value is not None:
                continue
            producer = value.producer()
            if producer is not None:
                waiting.append(producer)
            elif not _tells_lengths(node, value, roles):
                return None
    assert last.graph is not None
    return [node for node in last.graph if node in found]


def _tells_lengths(node: ir.Node, value: ir.Value, roles: GraphRoles) -> bool:
    """Whether the node asks a graph input for lengths only; a past's tokens are the mask's by now.

    Embeddings may be looked up: there are as many as tokens.
    """
    if is_op(node, "Shape"):
        return value in (roles.attention_mask, roles.input_ids, *roles.caches)
    return value is roles.input_ids and is_op(node, "Gather")


def _computed(
    nodes: list[ir.Node],
    last: ir.Node,
    roles: GraphRoles,
    opsets: list[onnx.OperatorSetIdProto],
    start: int,
) -> NDArray[Any] | None:
    mask, ids = np.ones((1, start + _ROWS), np.int64), np.ones((1, _ROWS), np.int64)
    feeds: dict[Any, NDArray[Any]] = {
        str(roles.attention_mask.name): mask,
        str(roles.input_ids.name): ids,
        **{str(cache.name): np.ones((1, 1, 1, 1)) for cache in roles.caches},
    }
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                feeds[str(value.name)] = _constant(value.const_value)
    results = evaluate(nodes, last.outputs[:1], feeds, opsets)
    return None if results is None else results[0]


def _constant(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """Its numbers; of an embedding table, which only its width is asked of, two rows of nothing."""
    if tensor.size <= _LARGEST_CONSTANT:
        return constant_array(tensor)
    return np.zeros((2, *tensor.shape.numpy()[1:]), np.float32)
