"""Puts unpacking and rotation back into the attention nodes whose sources did them inside."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.operators import add_function
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.rotation import DOMAIN, rotate, slot_positions, unpack
from trianglemix.exporter.graph.walk import needed_input


class FoldRotationPass(ir.passes.InPlacePass):
    """Three nodes a layer fewer: at decode, where each is a launch, that is what they cost.

    Only what patterns took out of a source's node goes back (`taken_out`, nodes of any operator),
    so the meaning is the source's. The operator's function does not know such nodes: where one is
    left after lowering, DropUnusedPass takes the function away, and the model needs the library.
    """

    def __init__(self, taken_out: Iterable[ir.Node]) -> None:
        super().__init__()
        self._taken_out = frozenset(taken_out)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [x for x in AttentionNode.all_of(model.graph) if _fold(x, self._taken_out)]
        if folded:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(folded))


class UnfoldRotationPass(ir.passes.InPlacePass):
    """The opposite: every node in the canonical form, with the operator's function."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [node for node in AttentionNode.all_of(model.graph) if node.is_folded]
        canonical = GraphBuilder(model.graph, "canonical")
        for triangle in folded:
            node = triangle.node
            build = canonical.at(node)
            rows = canonical_rows(build, triangle, triangle.seqlens_k)
            model.graph.insert_before(node, build.nodes)
            triangle.set_inputs(rows)
            node.attributes.pop(contract.ATTR_INTERLEAVED, None)
        for op_type in {node.node.op_type for node in AttentionNode.all_of(model.graph)}:
            add_function(model, op_type)
        model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, bool(folded))


def canonical_rows(
    build: GraphBuilder, node: AttentionNode, seqlens: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values as the canonical form takes them: apart, and turned.

    `seqlens` `[B]` says which slots the new tokens get, which is where they turn.
    """
    shape = node.shape
    query, key, value = node.query, node.key, node.value
    if key is None or value is None:
        query, key, value = unpack(build, query, shape)
    rotation = node.rotation
    if rotation is not None:
        at = slot_positions(build, seqlens, query)
        query = rotate(build, query, (shape.num_heads, shape.head_size), rotation, at)
        key = rotate(build, key, (shape.kv_num_heads, shape.head_size), rotation, at)
    return query, key, value


def _fold(triangle: AttentionNode, taken_out: frozenset[ir.Node]) -> bool:
    """Folds what it can into one canonical node; false where there is nothing."""
    node, query, key, value = triangle.node, triangle.query, triangle.key, triangle.value
    assert key is not None
    assert value is not None
    tables: list[ir.Value] = []
    rotations = [_made_by(x, "RotaryEmbedding", taken_out) for x in (query, key)]
    if rotations[0] is not None and rotations[1] is not None:
        if rotations[0].attributes.get_int("interleaved", 0):
            node.attributes.add(ir.AttrInt64(contract.ATTR_INTERLEAVED, 1))
        tables = [needed_input(rotations[0], 2), needed_input(rotations[0], 3)]
        query, key = needed_input(rotations[0], 0), needed_input(rotations[1], 0)
    split = _made_by(query, "Split", taken_out)
    rows: list[ir.Value | None] = [query, key, value]
    if split is not None and list(split.outputs) == rows:
        rows = [needed_input(split, 0), None, None]
    elif not tables:
        return False
    triangle.set_inputs(rows, tables)
    return True


def _made_by(value: ir.Value, op_type: str, among: frozenset[ir.Node]) -> ir.Node | None:
    """The node of that operator that makes the value, if it is one of those."""
    producer = value.producer()
    return producer if producer in among and producer.op_type == op_type else None
