"""Puts a Softmax that is spelled out in its parts together, so that attention is found at it."""

from __future__ import annotations

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import (
    is_op,
    needed_input,
    optional_input,
    producer_of,
    small_constant,
)


class FuseSoftmaxPass(ir.passes.InPlacePass):
    """`Exp(x - max) / sum` and `Exp(LogSoftmax(x))` become Softmax over the last axis.

    The sum must be that of the exponentials alone: with anything added to it (attention sinks,
    softmax-plus-one) it stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, source = False, GraphBuilder(model.graph, "source")
        for node in list(model.graph):
            scores = _scores(node)
            if scores is None or node.outputs[0].is_graph_output():
                continue
            build = source.at(node)
            build.replace(node, build.op("Softmax", scores, axis=-1))
            modified = True
        return ir.passes.PassResult(model, modified)


def _scores(node: ir.Node) -> ir.Value | None:
    """What the weights that a node makes are the Softmax of."""
    if is_op(node, "Exp"):
        log = producer_of(node.inputs[0], "LogSoftmax")
        last = log is not None and _is_last(log.attributes.get_int("axis", -1), node.outputs[0])
        return needed_input(log, 0) if log is not None and last else None
    if not is_op(node, "Div"):
        return None
    power, total = producer_of(node.inputs[0], "Exp"), producer_of(node.inputs[1], "ReduceSum")
    if power is None or total is None or total.inputs[0] is not node.inputs[0]:
        return None
    if not _reduces_last(total, node.outputs[0]):
        return None
    exponent = needed_input(power, 0)
    shift = producer_of(exponent, "Sub")
    largest = producer_of(shift.inputs[1], "ReduceMax") if shift else None
    if shift is None or largest is None or largest.inputs[0] is not shift.inputs[0]:
        return exponent
    return needed_input(shift, 0) if _reduces_last(largest, exponent) else exponent


def _reduces_last(node: ir.Node, like: ir.Value) -> bool:
    """Whether a Reduce keeps every axis and sums over the last one alone."""
    given = small_constant(optional_input(node, 1))
    axes = node.attributes.get_ints("axes", ()) if given is None else given.reshape(-1).tolist()
    kept = node.attributes.get_int("keepdims", 1) == 1
    return kept and len(axes) == 1 and _is_last(int(axes[0]), like)


def _is_last(axis: int, value: ir.Value) -> bool:
    return axis == -1 or axis + 1 == rank(value)
