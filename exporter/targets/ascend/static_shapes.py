"""Gives every value of a graph a static shape, and computes what follows from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from trianglemix.custom_ops import contract
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.walk import constant_array

_LARGEST_FOLDED: Final = 2**16
_LARGEST_SHAPE_DATA: Final = 2**10
_RANDOM: Final = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform"}) | {
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


class FoldStaticShapesPass(ir.passes.InPlacePass):
    """Binds the graph's inputs to sizes and works through its nodes in order.

    Afterwards every value has a type and a static shape, and no node is left whose result follows
    from shapes and small constants. Nodes are standard operators of the model's opset, and
    constants are initializers.

    Raises:
        RefusedError: the shape of a value depends on what an input holds; the node is named.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._sizes = sizes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.inputs:
            assert value.name is not None
            value.shape = ir.Shape(self._sizes[value.name])
        opsets = [onnx.helper.make_opsetid("", model.graph.opset_imports[""])]
        for node in list(model.graph):
            if _drop_choice(model.graph, node):
                continue
            if node.domain == contract.DOMAIN:  # its maker gave its outputs their shapes
                continue
            known = _from_shape(node)
            if known is None and _is_constant(node):
                known = _evaluated(node, opsets)
            if known is None:
                _infer(node, opsets, model.ir_version)
            else:
                _replace(model.graph, node, known)
        return ir.passes.PassResult(model, True)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The sizes of a value, None unless all of them are known."""
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(dim) for dim in value.shape.numpy())


def _from_shape(node: ir.Node) -> list[NDArray[Any]] | None:
    """The result of Shape or Size of a value of static shape."""
    if node.domain or node.op_type not in ("Shape", "Size"):
        return None
    operand = node.inputs[0]
    dims = None if operand is None else static_shape(operand)
    if dims is None:
        return None
    if node.op_type == "Size":
        return [np.array(np.prod(dims, dtype=np.int64), np.int64)]
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", None)
    return [np.array(dims[start:end], np.int64)]


def _drop_choice(graph: ir.Graph, node: ir.Node) -> bool:
    """Takes away a Where of one constant condition, if the branch it takes has the full shape."""
    if node.domain or node.op_type != "Where":
        return False
    condition = _constant(node.inputs[0])
    if condition is None or condition.size != 1 or node.outputs[0].is_graph_output():
        return False
    taken, other = node.inputs[1:] if bool(condition.numpy().item()) else node.inputs[:0:-1]
    assert taken is not None
    assert other is not None
    shapes = static_shape(taken), static_shape(other)
    if None in shapes or np.broadcast_shapes(*shapes, (1,)) != shapes[0]:  # type: ignore[arg-type]
        return False
    node.outputs[0].replace_all_uses_with(taken)
    graph.remove(node, safe=True)
    return True


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What an initializer holds, if it is small enough to compute with."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value if value.const_value.size <= _LARGEST_FOLDED else None


def _is_constant(node: ir.Node) -> bool:
    if node.domain or node.op_type in _RANDOM or not node.outputs:
        return False
    if any(isinstance(a, ir.Attr) and a.type in _GRAPHS for a in node.attributes.values()):
        return False
    return all(value is None or _constant(value) is not None for value in node.inputs)


_GRAPHS: Final = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _evaluated(node: ir.Node, opsets: list[onnx.OperatorSetIdProto]) -> list[NDArray[Any]] | None:
    """The node's results, None where they are large (a table is better computed than stored)."""
    if node.op_type in ("Expand", "ConstantOfShape", "Tile"):
        target = _constant(node.inputs[-1])
        if target is not None and np.prod(target.numpy(), dtype=np.int64) > _LARGEST_FOLDED:
            return None
    feeds: dict[str, NDArray[Any]] = {}
    for value in node.inputs:
        tensor = _constant(value)
        if value is not None and tensor is not None:
            assert value.name is not None
            feeds[value.name] = constant_array(tensor)
    arrays = evaluate([node], node.outputs, feeds, opsets)
    small = arrays is not None and all(array.size <= _LARGEST_FOLDED for array in arrays)
    return arrays if small else None


def evaluate(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    feeds: dict[str, NDArray[Any]],
    opsets: list[onnx.OperatorSetIdProto],
) -> list[NDArray[Any]] | None:
    """What the nodes make of these values; None where the evaluator lacks an operator or a type."""
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "piece",
        [onnx.ValueInfoProto(name=name) for name in feeds],
        [onnx.ValueInfoProto(name=value.name) for value in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    try:
        return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feeds)]
    except (RuntimeError, TypeError, ValueError):
        return None


def _replace(graph: ir.Graph, node: ir.Node, arrays: Sequence[NDArray[Any]]) -> None:
    """Initializers instead of the node's outputs, under the same names."""
    for value, array in zip(node.outputs, arrays, strict=True):
        name = value.name
        assert name is not None
        value.name = f"{name}/computed"
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        constant = ir.val(name, const_value=tensor)
        graph.register_initializer(constant)
        value.replace_all_uses_with(constant, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _infer(node: ir.Node, opsets: list[onnx.OperatorSetIdProto], ir_version: int) -> None:
    """Types and shapes of the node's outputs by ONNX's own inference, from those of its inputs."""
    version = opsets[0].version
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError as error:
        raise RefusedError(
            f"node {node.name} is {node.domain or 'ai.onnx'}::{node.op_type}, which opset "
            f"{version} lacks; export the model in standard operators"
        ) from error
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None or value.name is None:
            continue
        types[value.name] = _type_proto(value)
        tensor = _constant(value)
        if tensor is not None and tensor.size <= _LARGEST_SHAPE_DATA:
            data[value.name] = onnx.numpy_helper.from_array(constant_array(tensor), value.name)
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, ir.to_proto(node), types, data, opset_imports=opsets, ir_version=ir_version
        )
    except onnx.shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())
        raise RefusedError(f"node {node.name} does not fit static shapes: {reason}") from error
    for value in node.outputs:
        if value.name:
            _set_type(node, value, found.get(value.name))


def _set_type(node: ir.Node, value: ir.Value, proto: onnx.TypeProto | None) -> None:
    dims = None if proto is None else list(proto.tensor_type.shape.dim)
    if proto is None or dims is None or not all(dim.HasField("dim_value") for dim in dims):
        raise RefusedError(
            f"the shape of {value.name}, which node {node.name} ({node.op_type}) makes, depends "
            "on what the inputs hold; a static graph cannot have it"
        )
    value.type = ir.TensorType(ir.DataType(proto.tensor_type.elem_type))
    value.shape = ir.Shape([dim.dim_value for dim in dims])


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    dims = static_shape(value)
    assert dims is not None, f"{value.name} has no static shape yet"
    assert value.dtype is not None, f"{value.name} has no type yet"
    return onnx.helper.make_tensor_type_proto(int(value.dtype), dims)
