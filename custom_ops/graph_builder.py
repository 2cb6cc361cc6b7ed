"""Builds nodes and constants for a graph or a function, with readable and unique names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

PREFIX: Final = "trianglemix"
"""Every node, value and constant that is made here has a name that starts with this."""
_MOST_SPELLED: Final = 8  # numbers of a constant that its name shows

AttributeValue = int | float | str | Sequence[int] | ir.TensorProtocol | ir.Attr


class GraphBuilder:
    """Collects new nodes of one graph; they are in it once the caller inserts `nodes`.

    Constants are initializers, in the graph at once, and the same constant twice is one. But for
    `dimension`, the methods use operators as they have been since opset 13.
    """

    def __init__(self, graph: ir.Graph, scope: str, taken: set[str] | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self.graph = graph
        self._scope = f"{PREFIX}/{scope}"
        self._taken = _names_in(graph) if taken is None else taken

    def at(self, scope: str | ir.Node) -> GraphBuilder:
        """Another builder of the same graph, for what a node becomes; no name is made twice."""
        if isinstance(scope, ir.Node):
            scope = f"source/{scope.name or scope.outputs[0].name}"
        return GraphBuilder(self.graph, scope, self._taken)

    @property
    def opset(self) -> int:
        """The graph's version of the default operator set."""
        return self.graph.opset_imports[""]

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: AttributeValue
    ) -> ir.Value:
        """Appends a node of one output and returns that output."""
        return self.node(op_type, inputs, domain=domain, attributes=attributes).outputs[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        attributes: Mapping[str, AttributeValue] | None = None,
        num_outputs: int = 1,
    ) -> ir.Node:
        """Appends a node."""
        name = self._free(f"{self._scope}/{op_type}")
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or None,
            domain=domain,
            num_outputs=num_outputs,
            name=name,
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}/{index}"
        self.nodes.append(node)
        return node

    def replace(self, node: ir.Node, *made: ir.Value | None) -> None:
        """The new nodes stand in the graph instead of `node`, `made` instead of its outputs."""
        owner = node.graph
        assert isinstance(owner, ir.Graph)
        owner.insert_before(node, self.nodes)
        for old, new in zip(node.outputs, made, strict=False):
            if new is not None:
                replace_value(old, new)
        owner.remove(node, safe=True)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """The constant of that content and name; a number follows where others have the name."""
        for full_name in _numbered(f"{PREFIX}/{name}"):
            existing = self.graph.initializers.get(full_name)
            if existing is not None and _holds(existing, array):
                return existing
            if existing is None and full_name not in self._taken:
                break
        return self._initializer(full_name, ir.tensor(np.asarray(array, order="C")))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A constant of its own, whatever others hold."""
        return self._initializer(self._free(f"{self._scope}/{name}"), tensor)

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.int64(values)

    def int32(self, values: ArrayLike) -> ir.Value:
        """An int32 constant of any rank."""
        return self._numbers(np.asarray(values, np.int32))

    def int64(self, values: ArrayLike) -> ir.Value:
        """An int64 constant of any rank."""
        return self._numbers(np.asarray(values, np.int64))

    def scalar(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A constant of rank 0 in one of the floating-point types."""
        return self._numbers(np.asarray(value).astype(dtype.numpy()))

    def dimension(self, value: ir.Value, axis: int) -> ir.Value:
        """Size of one axis as a 1-D int64 of one element (opset 15)."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def sizes(self, *parts: int | ir.Value) -> ir.Value:
        """Numbers and 1-D values one after the other, as 1-D int64."""
        values: list[ir.Value] = []
        numbers: list[int] = []
        for part in parts:
            if not isinstance(part, ir.Value):
                numbers.append(part)
                continue
            values += [self.ints(*numbers), part] if numbers else [part]
            numbers = []
        values += [self.ints(*numbers)] if numbers else []
        return self.concat(*values)

    def reshape(self, value: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        return self.op("Reshape", value, self.sizes(*sizes))

    def expand(self, value: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        return self.op("Expand", value, self.sizes(*sizes))

    def transpose(self, value: ir.Value, *order: int) -> ir.Value:
        return self.op("Transpose", value, perm=order)

    def squeeze(self, value: ir.Value, *axes: int) -> ir.Value:
        return self.op("Squeeze", value, self.ints(*axes))

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", value, self.ints(*axes))

    def slice(self, value: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        return self.op("Slice", value, self.ints(start), self.ints(stop), self.ints(axis))

    def concat(self, *values: ir.Value, axis: int = 0) -> ir.Value:
        """The values side by side; one value alone is returned as it is."""
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def range_to(self, count: ir.Value) -> ir.Value:
        """`0 .. count-1` (int64) for a 1-D `count` of one element."""
        return self.op("Range", self.int64(0), self.squeeze(count, 0), self.int64(1))

    def reduce(self, op_type: str, value: ir.Value, axis: int, *, keepdims: int = 0) -> ir.Value:
        """ReduceMax, ReduceMean, ReduceMin or ReduceSum over one axis.

        All but ReduceSum take their axes as an attribute before opset 18.
        """
        if op_type == "ReduceSum" or self.opset >= 18:
            return self.op(op_type, value, self.ints(axis), keepdims=keepdims)
        return self.op(op_type, value, axes=[axis], keepdims=keepdims)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        tensor.name = name
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _free(self, base: str) -> str:
        """A name that nothing has, taken."""
        name = next(name for name in _numbered(base) if name not in self._taken)
        self._taken.add(name)
        return name

    def _numbers(self, array: NDArray[Any]) -> ir.Value:
        """A constant named by its content, or by its shape where that is long."""
        plural = "s" if array.ndim else ""
        shown = array.reshape(-1).tolist() if array.size <= _MOST_SPELLED else array.shape
        numbers = (f"{x:g}" if isinstance(x, float) else str(x) for x in shown)
        return self.constant("_".join([f"{array.dtype}{plural}", *numbers]), array)


class FunctionBuilder(GraphBuilder):
    """The same for the graph of a function, where constants are nodes: it has no initializers."""

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self.op("Constant", value=ir.tensor(array, name=name))

    def attribute(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """The calling node's attribute `name` as a scalar constant."""
        field = "value_int" if kind == ir.AttributeType.INT else "value_float"
        reference = {field: ir.RefAttr(field, name, kind)}
        return self.node("Constant", [], attributes=reference).outputs[0]


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Every use of `old`, and its name where it is a graph output, goes to `new`."""
    new.type = old.type
    if old.shape is not None:
        new.shape = ir.Shape(old.shape)
    was_output, name = old.is_graph_output(), old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if was_output:
        old.name = f"{name}/replaced"
        new.name = name


def _numbered(base: str) -> Iterator[str]:
    """`base`, `base_1`, `base_2` and so on."""
    return (base if n == 0 else f"{base}_{n}" for n in count())


def _names_in(graph: ir.Graph) -> set[str]:
    """Names of nodes and values that are taken."""
    made = (name for node in graph for name in (node.name, *(x.name for x in node.outputs)))
    return {name for name in (*made, *graph.initializers) if name}


def _holds(value: ir.Value, array: NDArray[Any]) -> bool:
    """Whether a constant has the array's type, shape and content; one in a file is not read."""
    tensor = value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return False
    if tensor.shape.numpy() != array.shape:
        return False
    return (
        tensor.dtype == ir.DataType.from_numpy(array.dtype) and tensor.tobytes() == array.tobytes()
    )
