"""Appends nodes and shared constants to a graph whose every shape is a number.

Only operators that mean the same from opset 13 to 18 are offered, so that what is built here fits
any graph in that range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class StaticTape:
    """A list of nodes in order, and constants of which equal ones are kept once."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0
        self.nodes: list[ir.Node] = []

    @property
    def initializers(self) -> list[ir.Value]:
        """Every constant that was asked for, each with its tensor."""
        return list(self._constants.values())

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int | float | Sequence[int]] | None = None,
    ) -> ir.Value:
        """The output of a new node of one output."""
        name = f"{self._prefix}/{op_type}_{self._count}"
        self._count += 1
        node = ir.node(op_type, inputs, attributes=attributes or None, name=name)
        node.outputs[0].name = f"{name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """An initializer with the array's shape and dtype."""
        array = np.asarray(array, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{self._prefix}/constant_{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            self._constants[key] = ir.Value(
                name=name,
                const_value=tensor,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
            )
        return self._constants[key]

    def int32(self, values: NDArray[Any] | Sequence[int] | int) -> ir.Value:
        """Positions and indices: int32, which every chip compares and adds natively."""
        return self.constant(np.asarray(values, np.int32))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A constant of rank 0 in one of the floating-point types."""
        return self.constant(np.asarray(value).astype(dtype.numpy()))

    def reshape(self, value: ir.Value, *dims: int) -> ir.Value:
        return self.op("Reshape", [value, self._dims(*dims)])

    def expand(self, value: ir.Value, *dims: int) -> ir.Value:
        return self.op("Expand", [value, self._dims(*dims)])

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        return self.op("Transpose", [value], {"perm": list(perm)})

    def slice(self, value: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        bounds = (self._dims(start), self._dims(stop), self._dims(axis))
        return self.op("Slice", [value, *bounds])

    def concat(self, axis: int, *values: ir.Value) -> ir.Value:
        """The values side by side; one value alone is returned as it is."""
        return values[0] if len(values) == 1 else self.op("Concat", values, {"axis": axis})

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", [value], {"to": int(dtype)})

    def _dims(self, *values: int) -> ir.Value:
        return self.constant(np.asarray(values, np.int64))
