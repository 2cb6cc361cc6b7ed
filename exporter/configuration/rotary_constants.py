"""The rotary frequencies that stand as constants in a graph: tables of angles, or the angles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.exporter.graph.walk import constant_array

_FLOATS: Final = (
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE,
)  # fmt: skip
_ROWS: Final = (1, 7, 61, 509, 4093)  # positions at which a table is looked at
_TOLERANCE: Final = 1e-2  # of cosines, float16 and positions of some thousands included


@dataclass(frozen=True)
class RotaryConstant:
    """A tensor that may hold rotary factors: rows by position, or one row of frequencies."""

    name: str
    rows: dict[int, NDArray[np.float64]]
    length: int  # rows of a table, 1 for frequencies

    @property
    def is_table(self) -> bool:
        """Whether it holds cosines or sines of every position."""
        return self.length > 1


def find_rotary_constants(graph: ir.Graph, half: int) -> list[RotaryConstant]:
    """Constants as wide as `half` a rotation, or as a whole one, in the graph and its branches.

    A weight of that width is among them: whoever asks compares it with what he expects.
    """
    found = []
    for name, tensor in _tensors(graph):
        shape = [size for size in tensor.shape.numpy() if size != 1]
        if tensor.dtype not in _FLOATS:
            continue
        if shape == [half]:
            values = constant_array(tensor).reshape(-1).astype(np.float64)
            found.append(RotaryConstant(name, {1: values}, 1))
        elif len(shape) == 2 and shape[1] in (half, 2 * half) and shape[0] > _ROWS[1]:
            table = constant_array(tensor).reshape(shape)
            rows = {row: _once(table[row], half) for row in (0, *_ROWS) if row < shape[0]}
            found.append(RotaryConstant(name, rows, shape[0]))
    return found


def holds(constant: RotaryConstant, frequencies: NDArray[np.float64]) -> bool:
    """Whether it holds these frequencies, or their cosines or sines at every position."""
    if not constant.is_table:
        return bool(np.allclose(constant.rows[1], frequencies, rtol=2e-3, atol=1e-7))
    magnitude = table_magnitude(constant)
    if magnitude is None:
        return _same(constant, frequencies, np.sin, 1.0)
    return _same(constant, frequencies, np.cos, magnitude)


def is_rotary(constant: RotaryConstant) -> bool:
    """Whether it cannot well be anything else: frequencies that fall, or cosines of such."""
    if not constant.is_table:
        values = constant.rows[1]
        return bool(values[0] <= 1 + 1e-3 and values[-1] >= 0 and (np.diff(values) < 0).all())
    magnitude = table_magnitude(constant)
    if magnitude is None or len(constant.rows[1]) < 2:
        return False
    rows = np.stack(list(constant.rows.values()))
    turns = np.abs(rows - magnitude).max() > 0.05 * magnitude
    bounded = np.abs(rows).max() <= magnitude * 1.001
    return bool(turns and bounded and (np.diff(constant.rows[1]) > -1e-6).all())


def table_magnitude(constant: RotaryConstant) -> float | None:
    """What multiplies the cosines of a table; None of sines, of frequencies, of something else."""
    if not constant.is_table:
        return None
    first = constant.rows[0]
    same = np.allclose(first, first[0], rtol=1e-3) and first[0] > 0.1
    return float(first[0]) if same else None


def _once(row: NDArray[Any], half: int) -> NDArray[np.float64]:
    """A row whose factors may stand twice: one half after the other, or in pairs."""
    values = row.astype(np.float64)
    paired = len(values) > half and np.array_equal(values[::2], values[1::2])
    return values[::2] if paired else values[:half]


def _same(
    constant: RotaryConstant, frequencies: NDArray[np.float64], function: np.ufunc, factor: float
) -> bool:
    return all(
        np.abs(values - factor * function(row * frequencies)).max() < _TOLERANCE * factor
        for row, values in constant.rows.items()
    )


def matches(
    constants: Sequence[RotaryConstant], frequencies: NDArray[np.float64]
) -> list[RotaryConstant]:
    """Those that hold the frequencies."""
    return [constant for constant in constants if holds(constant, frequencies)]


def _tensors(graph: ir.Graph) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Initializers and Constants, those of branches included; weights stay on disk."""
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value
    for node in graph:
        for attribute in node.attributes.values():
            if not isinstance(attribute, ir.Attr):
                continue
            if attribute.type == ir.AttributeType.TENSOR and node.op_type == "Constant":
                yield str(node.outputs[0].name), attribute.as_tensor()
            elif attribute.type == ir.AttributeType.GRAPH:
                yield from _tensors(attribute.as_graph())
