"""The operator as one model-local ONNX function: its rule, in standard operators.

Rows and keys meet tiles and blocks through matrices of ones: sums over a block are a product.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import (
    ATTR_MASS,
    ATTR_MIN_LENGTH,
    OP_TYPE,
    OUTPUTS,
    SAMPLE_STEP,
    TILE,
)
from trianglemix.custom_ops.function_body import Scores, masked_attention, softmax
from trianglemix.custom_ops.graph_builder import FunctionBuilder

_INT, _INT64, _FLOAT = ir.AttributeType.INT, ir.DataType.INT64, ir.DataType.FLOAT
_OWN: Final = {
    ATTR_MASS: ir.AttributeType.FLOAT,
    ATTR_MIN_LENGTH: _INT,
    contract.ATTR_SINK: _INT,
    contract.ATTR_WINDOW: _INT,
    contract.ATTR_LAST: _INT,
}


class _Grid(NamedTuple):
    """Places counted from `first_valid`, and the tiles (or blocks) `[C]` that they are cut into."""

    row: ir.Value  # [B, S]
    slot: ir.Value  # [B, T]
    prompt: ir.Value  # [B, 1], N
    end: ir.Value  # [B, 1], L
    tile: ir.Value  # [C]


def build_function() -> ir.Function:
    """A new `trianglemix::BlockSparseAttention` function at `contract.FUNCTION_OPSET`."""
    return masked_attention(OP_TYPE, _OWN, _kept, OUTPUTS)


def _kept(b: FunctionBuilder, given: Scores) -> tuple[ir.Value, ir.Value]:
    """The rows' mask `[B, G, H/G, S, T]`, and `block_mask`."""
    grid = _grid(b, given)
    causal = b.op("LessOrEqual", b.unsqueeze(grid.slot, 1), b.unsqueeze(grid.row, 2))  # [B, S, T]
    real = b.op(
        "And", b.unsqueeze(given.exists, 1), b.unsqueeze(b.op("Less", grid.row, grid.end), 2)
    )
    causal = b.unsqueeze(b.op("And", causal, real), 1, 2)
    of_block = _ones(b, grid.slot, grid.tile)  # [B, 1, 1, T, C]
    of_tile = _ones(b, grid.row, grid.tile)  # [B, 1, 1, S, C]
    sampled = b.op("Mul", of_tile, b.unsqueeze(b.cast(_is_sampled(b, grid), _FLOAT), 1, 2, 4))
    sampled = b.transpose(sampled, 0, 1, 2, 4, 3)  # [B, 1, 1, C, S]
    shares = b.op("MatMul", sampled, softmax(b, given.scores, causal))
    sums, size = b.op("MatMul", shares, of_block), b.dimension(grid.tile, 0)  # [B, G, H/G, C, C]
    count = b.reduce("ReduceSum", sampled, -1, keepdims=1)
    kept = b.op("Or", _massive(b, sums, size), _forced(b, grid.tile))
    kept = b.op("Or", kept, b.op("Or", _is_dense(b, grid), b.op("Less", count, b.scalar(0.5))))
    blocks = b.op("And", kept, _in_call(b, grid))
    ones = b.op("MatMul", of_tile, b.cast(blocks, _FLOAT))  # [B, G, H/G, S, C]
    keys = b.op("MatMul", ones, b.transpose(of_block, 0, 1, 2, 4, 3))
    rows = b.op("And", b.op("Greater", keys, b.scalar(0.5)), causal)
    mask = b.reshape(b.cast(blocks, ir.DataType.UINT8), b.dimension(grid.row, 0), -1, size, size)
    return rows, mask


def _grid(b: FunctionBuilder, given: Scores) -> _Grid:
    first = b.unsqueeze(b.cast(given.inputs["first_valid"], _INT64), 1)
    prompt = b.unsqueeze(b.cast(given.inputs["prompt_length"], _INT64), 1)
    row, slot, prompt, end = (
        b.op("Sub", x, first)
        for x in (given.row, b.unsqueeze(given.slot, 0), prompt, b.unsqueeze(given.end, 1))
    )
    slots = b.dimension(given.slot, 0)
    tiles = b.op("Div", b.op("Add", slots, b.ints(TILE - 1)), b.ints(TILE))
    return _Grid(row, slot, prompt, end, b.range_to(tiles))


def _ones(b: FunctionBuilder, place: ir.Value, tile: ir.Value) -> ir.Value:
    """`[B, 1, 1, X, C]`: 1 where a place `[B, X]` stands in a tile."""
    begin = b.op("Mul", tile, b.int64(TILE))
    distance = b.op("Sub", b.unsqueeze(place, 2), begin)
    inside = b.op("GreaterOrEqual", distance, b.int64(0))
    inside = b.op("And", inside, b.op("Less", distance, b.int64(TILE)))
    return b.unsqueeze(b.cast(inside, _FLOAT), 1, 2)


def _is_sampled(b: FunctionBuilder, grid: _Grid) -> ir.Value:
    """`[B, S]`: every 16th row, of those that hold a token of the prompt."""
    step = b.op("Mod", grid.row, b.int64(SAMPLE_STEP))
    end = b.op("Min", grid.prompt, grid.end)
    return b.op("And", b.op("Equal", step, b.int64(SAMPLE_STEP - 1)), b.op("Less", grid.row, end))


def _massive(b: FunctionBuilder, sums: ir.Value, size: ir.Value) -> ir.Value:
    """Blocks that hold at least the threshold (`rule.threshold`)."""
    top = b.node("TopK", [sums, size], attributes={"axis": -1}, num_outputs=2).outputs[0]
    wanted = b.op(
        "Mul",
        b.attribute(ATTR_MASS, ir.AttributeType.FLOAT),
        b.reduce("ReduceSum", sums, -1, keepdims=1),
    )
    short = b.op("Less", b.op("CumSum", top, b.int64(-1)), wanted)
    index = b.reduce("ReduceSum", b.cast(short, _INT64), -1, keepdims=1)
    index = b.op("Min", index, b.op("Sub", size, b.ints(1)))
    return b.op("GreaterOrEqual", sums, b.op("GatherElements", top, index, axis=-1))


def _forced(b: FunctionBuilder, tile: ir.Value) -> ir.Value:
    """`[C, C]`: blocks of sinks and of the window (`rule.forced_blocks`)."""
    begin = b.op("Mul", tile, b.int64(TILE))
    sinks = b.op("Less", begin, b.attribute(contract.ATTR_SINK, _INT))
    behind = b.op("Sub", begin, b.attribute(contract.ATTR_WINDOW, _INT))
    near = b.op("Div", b.op("Add", behind, b.int64(1)), b.int64(TILE))
    return b.op("Or", sinks, b.op("GreaterOrEqual", tile, b.unsqueeze(near, 1)))


def _is_dense(b: FunctionBuilder, grid: _Grid) -> ir.Value:
    """`[B, 1, 1, C, 1]`: tiles that keep everything unasked (`rule.Rows.is_dense`)."""
    begin = b.op("Mul", grid.tile, b.int64(TILE))
    last = b.op("Sub", grid.prompt, b.attribute(contract.ATTR_LAST, _INT))
    dense = b.op("Greater", b.op("Add", begin, b.int64(TILE)), last)  # [B, C]
    dense = b.op("Or", dense, b.op("Less", begin, _start(b, grid)))
    short = b.op("LessOrEqual", grid.prompt, b.attribute(ATTR_MIN_LENGTH, _INT))
    whole = b.op("Less", b.attribute(contract.ATTR_WINDOW, _INT), b.int64(0))
    mass = b.attribute(ATTR_MASS, ir.AttributeType.FLOAT)
    whole = b.op("Or", whole, b.op("GreaterOrEqual", mass, b.scalar(1.0)))
    return b.unsqueeze(b.op("Or", dense, b.op("Or", short, whole)), 1, 2, 4)


def _in_call(b: FunctionBuilder, grid: _Grid) -> ir.Value:
    """`[B, 1, 1, C, C]`: causal blocks of tiles that have a row in this call."""
    begin = b.op("Mul", grid.tile, b.int64(TILE))
    here = b.op("Greater", b.op("Add", begin, b.int64(TILE)), _start(b, grid))
    here = b.op("And", here, b.op("Less", begin, grid.end))
    causal = b.op("LessOrEqual", grid.tile, b.unsqueeze(grid.tile, 1))
    return b.op("And", b.unsqueeze(here, 1, 2, 4), causal)


def _start(b: FunctionBuilder, grid: _Grid) -> ir.Value:
    """`[B, 1]`: the place of the first new row."""
    return b.slice(grid.row, 1, 0, 1)
