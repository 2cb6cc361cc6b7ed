"""Sizes and types that the file does not state, as far as its constants tell them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.exporter.graph.walk import (
    dtype_of,
    is_op,
    needed_input,
    optional_input,
    small_constant,
)


class InferShapesPass(ir.passes.InPlacePass):
    """ONNX's shape inference, without the weights; what the file states itself stays as it is.

    Only numbers are taken over, no symbols: two values with one symbol promise ONNX Runtime an
    equal size, which a rewritten graph need not keep.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        values = [value for node in model.graph for value in node.outputs]
        unknown = [value for value in values if value.shape is None or value.dtype is None]
        if not unknown:
            return ir.passes.PassResult(model, False)
        values += [*model.graph.inputs, *model.graph.initializers.values()]
        stated = {value: (value.shape, value.type) for value in values}
        with _silence():
            common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
            if any([_state_reshape(node) for node in model.graph]):
                common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        for value, (shape, kind) in stated.items():
            value.shape = _numbers_only(value.shape) if shape is None else shape
            if kind is not None:
                value.type = kind
        return ir.passes.PassResult(model, True)


def _state_reshape(node: ir.Node) -> bool:
    """The sizes that a Reshape is given, where nothing is known of what it reshapes."""
    made = node.outputs[0]
    if not is_op(node, "Reshape") or made.shape is not None:
        return False
    wanted, dtype = small_constant(optional_input(node, 1)), dtype_of(needed_input(node, 0))
    if wanted is None or dtype is None or node.attributes.get_int("allowzero"):
        return False
    made.shape = ir.Shape([int(size) if size > 0 else None for size in wanted.reshape(-1)])
    made.type = ir.TensorType(dtype)
    return True


def _numbers_only(shape: ir.Shape | None) -> ir.Shape | None:
    if shape is None:
        return None
    return ir.Shape([size if isinstance(size, int) else None for size in shape])


@contextmanager
def _silence() -> Iterator[None]:
    """A graph that cannot be inferred is no news for the user: the patterns say what they miss."""
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
