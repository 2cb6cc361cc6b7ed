"""Lowers dense and windowed `TriangleAttention` nodes to `com.microsoft::GroupQueryAttention`."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.fold_rotation import rotation_of
from trianglemix.exporter.insert import is_triangle, is_triangle_attention, replace_value
from trianglemix.exporter.lengths import is_no_left_padding, nan_where
from trianglemix.exporter.node_builder import PREFIX, AttributeValue, NodeBuilder
from trianglemix.exporter.walk import needed_input

_DOMAIN: Final = "com.microsoft"


class LowerDenseSitesPass(ir.passes.InPlacePass):
    """Every dense or windowed site becomes GroupQueryAttention; triangle sites stay.

    GroupQueryAttention knows no left padding. A row that is padded on the left therefore gets NaN
    from the last such site on: wrong input is never silent.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        sites = [node for node in graph if is_triangle_attention(node) and not is_triangle(node)]
        if not sites:
            return ir.passes.PassResult(model, False)
        clamped: dict[ir.Value, ir.Value] = {}
        for node in sites:
            self._lower(graph, node, clamped, is_last=node is sites[-1])
        graph.opset_imports[_DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if is_triangle_attention(node) and not is_triangle(node):
                raise ir.passes.PostconditionError(f"{node.name} is still there")

    @staticmethod
    def _lower(
        graph: ir.Graph, node: ir.Node, clamped: dict[ir.Value, ir.Value], *, is_last: bool
    ) -> None:
        scope = (node.name or "").removeprefix(f"{PREFIX}/").rpartition("/")[0]
        build = NodeBuilder(graph, scope)  # the layer's own
        seqlens = needed_input(node, 5)
        if seqlens not in clamped:
            clamped[seqlens] = build.op("Max", seqlens, build.int32(0))
        lowered = build.node(
            "GroupQueryAttention",
            [
                *node.inputs[:3],
                *_pasts(build, node),
                clamped[seqlens],
                node.inputs[6],
                *_tables(node),
            ],
            domain=_DOMAIN,
            attributes=_attributes(node),
            num_outputs=3,
        )
        output = lowered.outputs[0]
        output.type = node.outputs[0].type
        first_valid = needed_input(node, 8)
        if is_last and not is_no_left_padding(first_valid):
            padded = build.op("Greater", first_valid, build.int32(0))
            output = nan_where(build, padded, output)
        graph.insert_before(node, build.nodes)
        for old, new in zip(node.outputs, [output, *lowered.outputs[1:]], strict=True):
            replace_value(old, new)


def _pasts(build: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Past key and value; one that a node makes gets a length that ONNX Runtime cannot name.

    It takes a present to be as long as its past where that length has a name, and lets the two
    share memory where the past is its own to give away; the call then fails.
    """
    pasts = [needed_input(node, index) for index in (3, 4)]
    return [
        x if x.is_graph_input() else build.op("Reshape", x, build.ints(0, 0, -1, 0)) for x in pasts
    ]


def _tables(node: ir.Node) -> list[ir.Value]:
    rotation = rotation_of(node)
    return [] if rotation is None else [rotation.cosines, rotation.sines]


def _attributes(node: ir.Node) -> dict[str, AttributeValue]:
    past_key, past_value = needed_input(node, 3), needed_input(node, 4)
    if past_key.shape and past_value.shape and past_key.shape[3] != past_value.shape[3]:
        raise RefusedError(
            f"{node.name} has keys of size {past_key.shape[3]} and values of size "
            f"{past_value.shape[3]}, which GroupQueryAttention does not take; use --target cpu "
            "(or hopper, on an H100 or H200) without --dense"
        )
    attributes: dict[str, AttributeValue] = {
        name: node.attributes[name].value
        for name in (contract.ATTR_NUM_HEADS, contract.ATTR_KV_NUM_HEADS, contract.ATTR_SCALE)
    }
    softcap = node.attributes.get_float(contract.ATTR_SOFTCAP, 0.0)
    if softcap:
        attributes["softcap"] = softcap
    window = node.attributes.get_int(contract.ATTR_WINDOW, contract.DENSE_WINDOW)
    if window != contract.DENSE_WINDOW:
        attributes["local_window_size"] = window
    rotation = rotation_of(node)
    if rotation is not None:
        attributes["do_rotary"] = 1
        attributes["rotary_interleaved"] = int(rotation.interleaved)
    return attributes
