"""Puts unpacking and rotation back into the attention nodes whose sources did them inside."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.function_body import build_function
from trianglemix.exporter.insert import is_triangle_attention
from trianglemix.exporter.node_builder import NodeBuilder
from trianglemix.exporter.rotation import (
    DOMAIN,
    FROM_INSIDE,
    Rotation,
    head_size,
    rotate,
    slot_positions,
    unpack,
)
from trianglemix.exporter.walk import needed_input, optional_input

_COSINES = len(contract.INPUTS)


class FoldRotationPass(ir.passes.InPlacePass):
    """Three nodes a layer fewer: at decode, where each is a launch, that is what they cost.

    Only what the exporter itself took out of a source's node goes back, so the meaning is the
    source's. The operator's function does not know such nodes: where one is left after lowering,
    DropUnusedPass takes the function away, and the model needs the library.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [node for node in model.graph if is_triangle_attention(node) and _fold(node)]
        if folded:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(folded))


class UnfoldRotationPass(ir.passes.InPlacePass):
    """The opposite: every node in the canonical form, with the operator's function."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [node for node in model.graph if is_triangle_attention(node) and is_folded(node)]
        for node in folded:
            build = NodeBuilder(model.graph, f"unfold/{node.name}")
            rows = canonical_rows(build, node, head_shape(node), needed_input(node, 5))
            model.graph.insert_before(node, build.nodes)
            _set_inputs(node, [*rows, *node.inputs[3:_COSINES]])
            node.attributes.pop(contract.ATTR_INTERLEAVED, None)
        function = build_function()
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, bool(folded))


def is_folded(node: ir.Node) -> bool:
    """Whether a TriangleAttention node unpacks or rotates inside."""
    return optional_input(node, 1) is None or optional_input(node, _COSINES) is not None


def rotation_of(node: ir.Node) -> Rotation | None:
    """How a TriangleAttention node turns queries and keys inside, if it does."""
    cosines = optional_input(node, _COSINES)
    if cosines is None:
        return None
    interleaved = node.attributes.get_int(contract.ATTR_INTERLEAVED, 0) == 1
    return Rotation(cosines, needed_input(node, _COSINES + 1), interleaved)


def canonical_rows(
    build: NodeBuilder, node: ir.Node, shape: AttentionShape, seqlens: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values as the canonical form takes them: apart, and turned.

    `seqlens` `[B]` says which slots the new tokens get, which is where they turn.
    """
    query, key, value = needed_input(node, 0), optional_input(node, 1), optional_input(node, 2)
    if key is None or value is None:
        query, key, value = unpack(build, query, shape)
    rotation = rotation_of(node)
    if rotation is not None:
        at = slot_positions(build, seqlens, query)
        query = rotate(build, query, (shape.num_heads, shape.head_size), rotation, at)
        key = rotate(build, key, (shape.kv_num_heads, shape.head_size), rotation, at)
    return query, key, value


def head_shape(node: ir.Node) -> AttentionShape:
    """The head layout of a TriangleAttention node, from its attributes and what its file states.

    Raises:
        ConfigurationError: the file does not say a head size.
    """
    heads, kv_heads = (
        node.attributes.get_int(name, 0)
        for name in (contract.ATTR_NUM_HEADS, contract.ATTR_KV_NUM_HEADS)
    )
    past_key, past_value = optional_input(node, 3), optional_input(node, 4)
    query, value = optional_input(node, 0), optional_input(node, 2)
    one_size = value is None or optional_input(node, _COSINES) is not None
    in_query = heads + 2 * kv_heads if value is None else heads
    size = head_size(past_key, query, in_query, optional_input(node, _COSINES))
    value_size = size if one_size else head_size(past_value, value, kv_heads, None)
    for name, found in (("keys", size), ("values", value_size)):
        if found is None:
            raise ConfigurationError(f"the file does not say the head size of {node.name}'s {name}")
    assert size is not None
    assert value_size is not None
    return AttentionShape(heads, kv_heads, size, value_size)


def _fold(node: ir.Node) -> bool:
    """Folds what it can into one canonical node; false where there is nothing."""
    query, key, value = (needed_input(node, index) for index in range(3))
    tables: list[ir.Value | None] = []
    rotations = _from_inside(query, "RotaryEmbedding"), _from_inside(key, "RotaryEmbedding")
    if rotations[0] is not None and rotations[1] is not None:
        if rotations[0].attributes.get_int("interleaved", 0):
            node.attributes.add(ir.AttrInt64(contract.ATTR_INTERLEAVED, 1))
        tables = [needed_input(rotations[0], 2), needed_input(rotations[0], 3)]
        query, key = needed_input(rotations[0], 0), needed_input(rotations[1], 0)
    split = _from_inside(query, "Split")
    rows: list[ir.Value | None] = [query, key, value]
    if split is not None and list(split.outputs) == rows:
        rows = [needed_input(split, 0), None, None]
    elif not tables:
        return False
    _set_inputs(node, [*rows, *node.inputs[3:_COSINES], *tables])
    return True


def _from_inside(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that makes the value, if the exporter took it out of an attention node."""
    producer = value.producer()
    inside = producer is not None and producer.op_type == op_type and FROM_INSIDE in producer.meta
    return producer if inside else None


def _set_inputs(node: ir.Node, inputs: list[ir.Value | None]) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
