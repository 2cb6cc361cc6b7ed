"""The operator as one model-local ONNX function: its mask, in standard operators."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.function_body import Scores, masked_attention
from trianglemix.custom_ops.graph_builder import FunctionBuilder
from trianglemix.custom_ops.triangle.contract import OP_TYPE

_OWN: Final = dict.fromkeys(
    (contract.ATTR_SINK, contract.ATTR_WINDOW, contract.ATTR_LAST), ir.AttributeType.INT
)


def build_function() -> ir.Function:
    """A new `trianglemix::TriangleAttention` function at `contract.FUNCTION_OPSET`."""
    return masked_attention(OP_TYPE, _OWN, _kept)


def _kept(b: FunctionBuilder, given: Scores) -> tuple[ir.Value]:
    """The predicate of `pattern.keep`."""
    integer, x = ir.AttributeType.INT, given.inputs
    i, j = b.unsqueeze(given.row, 2), b.unsqueeze(given.slot, 0, 1)
    first_valid = b.unsqueeze(b.cast(x["first_valid"], ir.DataType.INT64), 1, 2)
    prompt_length = b.unsqueeze(b.cast(x["prompt_length"], ir.DataType.INT64), 1, 2)
    window = b.attribute(contract.ATTR_WINDOW, integer)
    distance = b.op("Sub", i, j)
    sink = b.op("Less", b.op("Sub", j, first_valid), b.attribute(contract.ATTR_SINK, integer))
    near = b.op("Or", b.op("Less", distance, window), b.op("Less", window, b.int64(0)))
    last = b.op(
        "GreaterOrEqual",
        i,
        b.op("Sub", prompt_length, b.attribute(contract.ATTR_LAST, integer)),
    )
    kept = b.op("Or", b.op("Or", sink, near), last)
    kept = b.op("And", kept, b.op("GreaterOrEqual", distance, b.int64(0)))  # [B, S, T]
    return (b.unsqueeze(kept, 1, 2),)
