"""Writes a graph of an older opset as one of the opset that the operator's function needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import is_op, needed_input

OLDEST_OPSET: Final = 11
_AXES_AS_INPUT: Final = 13
IR_VERSION: Final = 8
"""The first version of the file format that holds functions."""
_MEANS_OTHER: Final = ("RoiAlign",)  # its default mode changed in 16


class RaiseOpsetPass(ir.passes.InPlacePass):
    """Opsets from 11 on become 17, and IR versions 8; every node computes what it did.

    Between 13 and 17 standard operators gained types and options. Before 13 some had their axes
    as attributes, and a softmax ran over all axes from the given one on. Shapes should be
    inferred before, so that a softmax over the last axis is seen to be one.

    Raises:
        RefusedError: an operator that means something else since.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = model.graph.opset_imports.get("", contract.FUNCTION_OPSET)
        old_format = model.ir_version < IR_VERSION
        if old_format:
            model.ir_version = IR_VERSION
        if before >= contract.FUNCTION_OPSET:
            return ir.passes.PassResult(model, old_format)
        model.graph.opset_imports[""] = contract.FUNCTION_OPSET
        source = GraphBuilder(model.graph, "source")
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if is_op(node, *_MEANS_OTHER):
                raise RefusedError(
                    f"node {node.name} ({node.op_type}) means something else in opset "
                    f"{contract.FUNCTION_OPSET} than in the model's {before}; export the model "
                    "again with a newer opset"
                )
            if before < _AXES_AS_INPUT:
                _rewrite(source.at(node), node)
        return ir.passes.PassResult(model, True)


def _rewrite(build: GraphBuilder, node: ir.Node) -> None:
    for op_types, write in _WRITERS:
        if is_op(node, *op_types):
            write(build, node)


def _numbers_to_input(build: GraphBuilder, node: ir.Node) -> None:
    """Axes, or sizes of a Split, become the second input."""
    name = "split" if is_op(node, "Split") else "axes"
    attribute = node.attributes.pop(name, None)
    if attribute is not None:
        node.resize_inputs(2)
        node.replace_input_with(1, build.ints(*attribute.as_ints()))


def _softmax_of_a_matrix(build: GraphBuilder, node: ir.Node) -> None:
    """Over all axes from the given one on: the last one alone, or a matrix and back."""
    axis, source = node.attributes.get_int("axis", 1), needed_input(node, 0)
    axes = rank(source) or rank(node.outputs[0])
    if axis == -1 or (axes is not None and axis == axes - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    matrix = build.op(node.op_type, build.op("Flatten", source, axis=axis), axis=-1)
    build.replace(node, build.op("Reshape", matrix, build.op("Shape", source)))


_Writer = Callable[[GraphBuilder, ir.Node], object]
_WRITERS: Final[tuple[tuple[tuple[str, ...], _Writer], ...]] = (
    (("Squeeze", "Unsqueeze", "ReduceSum", "Split"), _numbers_to_input),
    (("Softmax", "LogSoftmax", "Hardmax"), _softmax_of_a_matrix),
    (("Dropout",), lambda build, node: node.attributes.pop("ratio", None)),  # only training's
)


def raised_note(before: int) -> str:
    """What the report says of a source that was rewritten."""
    return (
        f"the source's opset {before} was raised to {contract.FUNCTION_OPSET}, where its nodes "
        "mean the same: the operator's function needs it"
    )
