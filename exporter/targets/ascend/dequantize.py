"""Block-quantized weights as plain ones, for ATC's parser has no operator that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.walk import needed_input, producer_of
from trianglemix.exporter.targets.ascend.weight_files import read_array

_DOMAIN: Final = "com.microsoft"
_BITS: Final = (4, 8)


class DequantizePass(ir.passes.InPlacePass):
    """`MatMulNBits` becomes MatMul, `GatherBlockQuantized` Gather; their weights are computed when
    they are written, one at a time. `count` of nodes had such weights.

    Raises:
        RefusedError: a form of them that is not covered; the node is named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        source = GraphBuilder(model.graph, "source")
        for node in list(model.graph):
            make = _MAKERS.get((node.domain, node.op_type))
            if make is None:
                continue
            build = source.at(node)
            build.replace(node, make(build, node))
            self.count += 1
        return ir.passes.PassResult(model, self.count > 0)


@dataclass(frozen=True)
class _Quantized:
    """Levels `[N, bytes]`, scales `[N, blocks]`, zero points, of rows of `width` numbers."""

    levels: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    bits: int
    block: int
    width: int

    def rows(self) -> Array:
        """`[N, width]`: `(level - zero point) * scale`."""
        scales = read_array(self.scales)
        levels = _unpacked(read_array(self.levels), self.bits)
        count = levels.shape[0]
        levels = levels.reshape(count, -1, self.block).astype(np.float32)
        blocks = levels.shape[1]
        centred = levels - self._zero_points(count, blocks)[..., None]
        rows = centred * scales.reshape(count, blocks, 1).astype(np.float32)
        result: Array = rows.reshape(count, -1)[:, : self.width].astype(scales.dtype)
        return result

    def _zero_points(self, count: int, blocks: int) -> Array:
        if self.zero_points is None:
            return np.full((count, blocks), 2.0 ** (self.bits - 1), np.float32)
        given = read_array(self.zero_points)
        if given.dtype == np.uint8:
            given = _unpacked(given.reshape(count, -1), self.bits)[:, :blocks]
        return given.reshape(count, blocks).astype(np.float32)


def _unpacked(packed: Array, bits: int) -> Array:
    """`[N, levels]` of bytes `[N, ...]`; of two levels in a byte the lower bits come first."""
    flat = packed.reshape(packed.shape[0], -1)
    if bits == 8:
        return flat
    return np.stack([flat & 15, flat >> 4], axis=-1).reshape(flat.shape[0], -1)


def _product(build: GraphBuilder, node: ir.Node) -> ir.Value:
    """Inputs: rows, levels `[N, blocks, bytes]`, scales, zero points, order, bias."""
    order, bias = [*node.inputs, None, None, None][4:6]
    if order is not None:
        raise RefusedError(f"node {node.name} reorders its weight's columns; not supported")
    quantized = _read(node, needed_input(node, 1), node.attributes["K"].as_int())
    shape = (quantized.width, node.attributes["N"].as_int())
    weight = _weight(build, quantized, shape, swap=True)
    product = build.op("MatMul", needed_input(node, 0), weight)
    return product if bias is None else build.op("Add", product, bias)


def _lookup(build: GraphBuilder, node: ir.Node) -> ir.Value:
    """Inputs: levels `[V, bytes]` (or a reshape of them), indices, scales, zero points."""
    axes = node.attributes.get_int("gather_axis", 0), node.attributes.get_int("quantize_axis", 1)
    if axes != (0, 1):
        raise RefusedError(f"node {node.name} gathers along axes {axes}; only (0, 1) is supported")
    data = needed_input(node, 0)
    reshape = producer_of(data, "Reshape")
    quantized = _read(node, data if reshape is None else needed_input(reshape, 0), None)
    shape = (int(quantized.levels.shape.numpy()[0]), quantized.width)
    table = _weight(build, quantized, shape, swap=False)
    return build.op("Gather", table, needed_input(node, 1), axis=0)


def _read(node: ir.Node, levels: ir.Value, width: int | None) -> _Quantized:
    """Scales and zero points are inputs 2 and 3. Without a width all levels of a row count."""
    bits = node.attributes.get_int("bits", 4)
    tensors = [
        None if value is None else ir.convenience.get_const_tensor(value)
        for value in (levels, *[*node.inputs, None][2:4])
    ]
    if bits not in _BITS or tensors[0] is None or tensors[1] is None:
        raise RefusedError(
            f"node {node.name} ({node.op_type}) has {bits} bits, or weights that are no constants; "
            "4 and 8 bits in constants are supported"
        )
    if tensors[0].dtype != ir.DataType.UINT8:
        raise RefusedError(f"node {node.name} has weights of {tensors[0].dtype}, not of UINT8")
    block = node.attributes.get_int("block_size", 128)
    count = int(tensors[0].shape.numpy()[0])
    return _Quantized(
        tensors[0], tensors[1], tensors[2], bits, block,
        width or tensors[0].nbytes // count * (8 // bits),
    )  # fmt: skip


def _weight(
    build: GraphBuilder, quantized: _Quantized, shape: tuple[int, int], *, swap: bool
) -> ir.Value:
    """An initializer whose numbers are computed each time that they are asked for."""
    dtype = quantized.scales.dtype

    def compute() -> ir.TensorProtocol:
        rows = quantized.rows()
        return ir.Tensor(np.ascontiguousarray(rows.T if swap else rows), dtype=dtype)

    return build.initializer("weight", ir.LazyTensor(compute, dtype, ir.Shape(shape)))


_MAKERS: Final[dict[tuple[str, str], Callable[[GraphBuilder, ir.Node], ir.Value]]] = {
    (_DOMAIN, "MatMulNBits"): _product,
    (_DOMAIN, "GatherBlockQuantized"): _lookup,
}
