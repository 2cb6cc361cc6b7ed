"""Lowers dense `TriangleAttention` nodes to `com.microsoft::GroupQueryAttention`."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops.graph_builder import AttributeValue, GraphBuilder
from trianglemix.exporter.attention.lengths import nan_where
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole

_DOMAIN: Final = "com.microsoft"


class LowerDenseSitesPass(ir.passes.InPlacePass):
    """Every dense site becomes GroupQueryAttention; windowed and triangle sites stay.

    A window stays with the operator, since `local_window_size` keeps another number of keys before
    ONNX Runtime 1.24. GroupQueryAttention knows no left padding. A row that is padded on the left
    therefore gets NaN from the last such site on: wrong input is never silent.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = AttentionNode.all_of(graph)
        sites = {x: layer for layer, x in enumerate(nodes) if x.role is LayerRole.DENSE}
        if not sites:
            return ir.passes.PassResult(model, False)
        clamped: dict[ir.Value, ir.Value] = {}
        *_, last = sites
        build = GraphBuilder(graph, "layers")
        for node, layer in sites.items():
            _lower(build.at(f"layer.{layer}"), node, clamped, is_last=node is last)
        graph.opset_imports[_DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in AttentionNode.all_of(model.graph):
            if node.role is LayerRole.DENSE:
                raise ir.passes.PostconditionError(f"{node.node.name} is still there")


def _lower(
    build: GraphBuilder, node: AttentionNode, clamped: dict[ir.Value, ir.Value], *, is_last: bool
) -> None:
    seqlens = node.seqlens_k
    if seqlens not in clamped:
        clamped[seqlens] = build.op("Max", seqlens, build.int32(0))
    rotation = node.rotation
    tables = [] if rotation is None else [rotation.cosines, rotation.sines]
    rows = [node.query, node.key, node.value, *_pasts(build, node)]
    lowered = build.node(
        "GroupQueryAttention",
        [*rows, clamped[seqlens], node.total_sequence_length, *tables],
        domain=_DOMAIN,
        attributes=_attributes(node),
        num_outputs=3,
    )
    output = lowered.outputs[0]
    output.type = node.node.outputs[0].type
    if is_last and not node.no_left_padding:
        padded = build.op("Greater", node.first_valid, build.int32(0))
        output = nan_where(build, padded, output)
    build.replace(node.node, output, *lowered.outputs[1:])


def _pasts(build: GraphBuilder, node: AttentionNode) -> list[ir.Value]:
    """Past key and value; one that a node makes gets a length that ONNX Runtime cannot name.

    It takes a present to be as long as its past where that length has a name, and lets the two
    share memory where the past is its own to give away; the call then fails.
    """
    return [x if x.is_graph_input() else build.reshape(x, 0, 0, -1, 0) for x in node.past]


def _attributes(node: AttentionNode) -> dict[str, AttributeValue]:
    past_key, past_value = node.past
    if past_key.shape and past_value.shape and past_key.shape[3] != past_value.shape[3]:
        raise RefusedError(
            f"{node.node.name} has keys of size {past_key.shape[3]} and values of size "
            f"{past_value.shape[3]}, which GroupQueryAttention does not take; use --target cpu "
            "(or hopper, on an H100 or H200) without --dense"
        )
    attributes: dict[str, AttributeValue] = {
        "num_heads": node.num_heads,
        "kv_num_heads": node.kv_num_heads,
        "scale": node.scale,
    }
    if node.softcap:
        attributes["softcap"] = node.softcap
    rotation = node.rotation
    if rotation is not None:
        attributes["do_rotary"] = 1
        attributes["rotary_interleaved"] = int(rotation.interleaved)
    return attributes
