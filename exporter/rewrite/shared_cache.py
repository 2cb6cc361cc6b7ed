"""Makes a graph right for one preallocated cache buffer bound to past and present."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.graph.attention_node import AttentionNode, is_attention
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.graph.walk import is_op

_TOKENS = 2  # axis of `[B, G, P, D]`


class FreeCacheLengthPass(ir.passes.InPlacePass):
    """Nothing but the operator looks at how long the cache tensors are.

    `P` of a past is read as `T - S` and `T` of a present as the attention mask's length, so that
    both may be longer than what they hold. Declared lengths of past and present become symbols of
    their own: an equal symbol elsewhere would promise ONNX Runtime an equal size.
    """

    def __init__(self, roles: GraphRoles) -> None:
        super().__init__()
        self._roles = roles
        self._made: dict[str, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, build = model.graph, GraphBuilder(model.graph, "cache_length")
        common.RemoveUnusedNodesPass()(model)  # dead masks ask for lengths, too
        for node in AttentionNode.all_of(graph):
            for past in node.past:
                self._free(build, past, "past")
            for present in node.present:
                self._free(build, present, "present")
        for value in self._roles.caches:
            _rename_length(value, "cache_length")
        for value in graph.outputs:
            producer = value.producer()
            if producer is not None and is_attention(producer):
                _rename_length(value, "cache_length_after")
        common.RemoveUnusedNodesPass()(model)
        graph.sort()
        return ir.passes.PassResult(model, True)

    def _free(self, build: GraphBuilder, cache: ir.Value, part: str) -> None:
        for node in list(cache.consumers()):
            if not is_op(node, "Shape"):
                continue
            start, end = _shape_range(node)
            if start <= _TOKENS < end:
                self._replace(build, node, cache, (start, end, part))

    def _replace(
        self, builder: GraphBuilder, node: ir.Node, cache: ir.Value, span: tuple[int, int, str]
    ) -> None:
        start, end, part = span
        build, pieces = builder.at(node), [self._length(builder, part)]
        if start < _TOKENS:
            pieces.insert(0, build.op("Shape", cache, start=start, end=_TOKENS))
        if end > _TOKENS + 1:
            pieces.append(build.op("Shape", cache, start=_TOKENS + 1, end=end))
        build.replace(node, build.concat(*pieces))

    def _length(self, builder: GraphBuilder, part: str) -> ir.Value:
        """`[1]` int64: tokens held before the call (past), or after it (present)."""
        if part not in self._made:
            build = builder.at(f"cache_length/{part}")
            total = build.dimension(self._roles.attention_mask, 1)
            length = build.dimension(self._roles.input_ids, 1)
            self._made[part] = total if part == "present" else build.op("Sub", total, length)
            build.graph.insert_before(next(iter(build.graph)), build.nodes)
        return self._made[part]


def can_share_cache(model: ir.Model) -> bool:
    """Whether every cache is read by the operator alone, but for sizes that do not change."""
    for node in model.graph:
        if not _appends(node):
            continue
        past, present = (
            AttentionNode(node).past,
            AttentionNode(node).present,
        )  # both have them there
        if not all(value.is_graph_input() for value in past):
            return False
        if not all(value.is_graph_output() for value in present):
            return False
        if not all(_only_shapes_else(cache, node) for cache in (*past, *present)):
            return False
    return True


def _appends(node: ir.Node) -> bool:
    """Whether it is the operator, or what a dense layer of it was lowered to."""
    lowered = (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
    return lowered or is_attention(node)


def _only_shapes_else(cache: ir.Value, attention: ir.Node) -> bool:
    for node in cache.consumers():
        if node is attention:
            continue
        start, end = _shape_range(node) if is_op(node, "Shape") else (0, 4)
        if start <= _TOKENS < end:
            return False
    return True


def _shape_range(node: ir.Node) -> tuple[int, int]:
    """The axes that a Shape node of a rank-4 value gives, as a half-open range."""
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", 4)
    start, end = (axis + 4 if axis < 0 else axis for axis in (start, end))
    return max(0, start), min(4, end)


def _rename_length(value: ir.Value, name: str) -> None:
    if value.shape is not None and not isinstance(value.shape[_TOKENS], int):
        value.shape = ir.Shape(
            [name if axis == _TOKENS else size for axis, size in enumerate(value.shape)]
        )
