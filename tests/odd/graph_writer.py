"""Writes an ONNX graph node by node, with random weights that do not depend on its spelling."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
CONTRIB: Final = "com.microsoft"
ONNX_TYPES: Final[dict[str, int]] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
_END: Final = 2**31 - 1


class GraphWriter:
    """Collects nodes, constants, inputs and outputs; methods return the names of values.

    Weights are drawn by their own name, so that two spellings of one model carry the same ones.
    """

    def __init__(self, seed: int, opset: int, dtype: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.opset = opset
        self.dtype = dtype
        self._seed = seed
        self._count = 0

    def name(self, hint: str) -> str:
        """A name that nothing else has."""
        self._count += 1
        return f"{hint}_{self._count}"

    def op(
        self, kind: str, *inputs: str, count: int = 1, out: list[str] | None = None, **more: Any
    ) -> Any:
        """The output's name, or a list of names where `count` or `out` asks for several."""
        names = out or [self.name(kind.lower()) for _ in range(count)]
        domain = more.pop("domain", "")
        node = helper.make_node(
            kind, list(inputs), names, name=self.name(f"node_{kind}"), domain=domain, **more
        )
        self.nodes.append(node)
        return names[0] if len(names) == 1 else names

    def constant(self, value: Any, dtype: DTypeLike = np.int64, name: str | None = None) -> str:
        """A constant; integers unless told otherwise."""
        name = name or self.name("constant")
        array = np.array(value, dtype, order="C")
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def number(self, value: float) -> str:
        """A scalar in the model's own float type."""
        return self.constant(value, self.dtype)

    def ints(self, *values: int) -> str:
        """A list of integers, `[n]`."""
        return self.constant(list(values))

    def weight(self, name: str, *shape: int, gain: float = 1.0) -> str:
        """A random matrix; the same for a name in every spelling of the model."""
        random = np.random.default_rng([self._seed, *name.encode()])
        scale = gain / np.sqrt(shape[0])
        return self.constant(random.standard_normal(shape) * scale, self.dtype, name)

    def graph_input(self, name: str, dtype: str, *shape: int | str) -> str:
        """Declares an input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape))
        return name

    def graph_output(self, name: str, dtype: str, *shape: int | str) -> str:
        """Declares an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape))
        return name

    def cast(self, value: str, dtype: str) -> str:
        """A Cast to a type by its numpy name."""
        return str(self.op("Cast", value, to=ONNX_TYPES[dtype]))

    def unsqueeze(self, value: str, *axes: int) -> str:
        """With axes as an input, as opset 13 has it."""
        return str(self.op("Unsqueeze", value, self.ints(*axes)))

    def tail(self, value: str, start: str, axis: int) -> str:
        """`value[start:]` on one axis; `start` is a value `[1]`."""
        return str(self.op("Slice", value, start, self.ints(_END), self.ints(axis)))

    def choose(self, condition: str, then: list[Array], otherwise: list[Array]) -> list[str]:
        """Constants by a condition: an If whose branches hold them as initializers."""
        branches = []
        for arrays in (then, otherwise):
            nodes, tensors, results = [], [], []
            for array in arrays:
                stored, result = self.name("stored"), self.name("chosen")
                tensors.append(numpy_helper.from_array(array.astype(self.dtype), stored))
                nodes.append(helper.make_node("Identity", [stored], [result]))
                kind = ONNX_TYPES[self.dtype]
                results.append(helper.make_tensor_value_info(result, kind, array.shape))
            name = self.name("branch")
            branches.append(helper.make_graph(nodes, name, [], results, tensors))
        more = {"then_branch": branches[0], "else_branch": branches[1]}
        return list(self.op("If", condition, count=len(then), **more))

    def dimension(self, value: str, axis: int) -> str:
        """The size of one axis, `[1]` int64."""
        return str(self.op("Gather", self.op("Shape", value), self.ints(axis)))

    def model(self, *, infer_shapes: bool, shuffle: bool) -> onnx.ModelProto:
        """The model; `shuffle` puts nodes out of order, which ONNX Runtime opens all the same."""
        nodes = list(self.nodes)
        graph = helper.make_graph(nodes, "odd", self.inputs, self.outputs, self.initializers)
        domains = [helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=8)
        if infer_shapes:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        if shuffle:
            order = np.random.default_rng(self._seed).permutation(len(nodes))
            shuffled = [model.graph.node[index] for index in order]
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in shuffled]
            del model.graph.node[:]
            model.graph.node.extend(copies)
        return model
