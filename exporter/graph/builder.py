"""Builds nodes and constants for insertion into a graph, with readable and unique names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

PREFIX: Final = "trianglemix"
"""Every node, value and constant that the exporter adds has a name that starts with this."""

_NAMES: Final = "trianglemix_names"

AttributeValue = int | float | str | Sequence[int]


class NodeBuilder:
    """Collects new nodes of one graph; nothing is in the graph until the caller inserts `nodes`.

    Constants are shared: the same constant twice is one initializer.
    """

    def __init__(self, graph: ir.Graph, scope: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._scope = f"{PREFIX}/{scope}"
        self._taken = _names_in(graph)

    @property
    def opset(self) -> int:
        """The graph's version of the default operator set."""
        return self._graph.opset_imports[""]

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
        attributes: dict[str, AttributeValue] | None = None,
        num_outputs: int = 1,
    ) -> ir.Node:
        """Appends a node."""
        name = self._unique(op_type)
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

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """The graph's constant of that name, made at first use."""
        full_name = f"{PREFIX}/{name}"
        existing = self._graph.initializers.get(full_name)
        if existing is not None:
            return existing
        tensor = ir.tensor(np.asarray(array, order="C"), name=full_name)
        value = ir.Value(
            name=full_name,
            const_value=tensor,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
        )
        self._graph.register_initializer(value)
        return value

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        text = "_".join(str(value) for value in values)
        return self.constant(f"ints_{text}", np.array(values, np.int64))

    def int32(self, value: int) -> ir.Value:
        """An int32 scalar constant."""
        return self.constant(f"int32_{value}", np.array(value, np.int32))

    def int64(self, value: int) -> ir.Value:
        """An int64 scalar constant."""
        return self.constant(f"int64_{value}", np.array(value, np.int64))

    def dimension(self, value: ir.Value, axis: int) -> ir.Value:
        """Size of one axis as a 1-D int64 of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def reduce(self, op_type: str, value: ir.Value, axis: int) -> ir.Value:
        """ReduceMax, ReduceMin or ReduceSum over one axis, which goes away.

        ReduceMax and ReduceMin take their axes as an attribute before opset 18.
        """
        if op_type == "ReduceSum" or self.opset >= 18:
            return self.op(op_type, value, self.ints(axis), keepdims=0)
        return self.op(op_type, value, axes=[axis], keepdims=0)

    def rename(self, value: ir.Value, name: str) -> ir.Value:
        """Gives a new value a name that says what it is, with a number where it is taken."""
        value.name = self._first_free(f"{PREFIX}/{name}")
        return value

    def _unique(self, op_type: str) -> str:
        return self._first_free(f"{self._scope}/{op_type}")

    def _first_free(self, base: str) -> str:
        candidates = (base if n == 0 else f"{base}_{n}" for n in count())
        name = next(name for name in candidates if name not in self._taken)
        self._taken.add(name)
        return name


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


def _names_in(graph: ir.Graph) -> set[str]:
    """Names of nodes and values that are taken, kept up to date by all builders of a graph."""
    if _NAMES not in graph.meta:
        made = (name for node in graph for name in (node.name, *(x.name for x in node.outputs)))
        graph.meta[_NAMES] = {name for name in made if name and name.startswith(PREFIX)}
    names: set[str] = graph.meta[_NAMES]
    return names
