"""Cuts a piece out of a graph, as a model of its own in float32, without reading any weights.

The piece is everything between boundary values, which become inputs, and the wanted outputs.
Whatever it needs besides (masks, positions) is followed back to the graph's own inputs; where only
the *shape* of a weight-dependent tensor is asked for, that tensor becomes an input as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.ort import import_onnxruntime
from trianglemix.exporter.graph.walk import constant_array, is_op

_HALF: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MAX_CONSTANT_BYTES: Final = 1 << 28
_FEW: Final = 16
_MANY: Final = 1 << 12


class CutError(ExportError):
    """The piece cannot be cut out or run on its own; the message says why."""


class CutRunError(CutError):
    """The piece does not run at the sizes that it was given; at others it may."""


@dataclass(frozen=True)
class CutOut:
    """A piece of a graph as a model. `inputs` are the original values, in the model's order."""

    model: ir.Model
    inputs: tuple[ir.Value, ...]
    shape_only: frozenset[ir.Value]

    def constants(self) -> set[int]:
        """Whole numbers from 2 to 2**20 that stand in the piece, floats of one element rounded.

        Of larger integer tensors the distinct values count where there are only a few; of a table,
        by position or by token, the places where it changes.
        """
        found: set[int] = set()
        for value in self.model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            found.update(_changes(tensor))
            if tensor.size > _FEW and not tensor.dtype.is_integer():
                continue
            if tensor.size <= _MANY and (tensor.dtype.is_integer() or tensor.size == 1):
                numbers = np.unique(np.round(np.asarray(tensor.numpy(), np.float64)))
                finite = numbers[np.abs(numbers) < 1 << 20]
                found.update(int(abs(number)) for number in finite[:_FEW])
        return {number for number in found if number > 1}

    def reads_ids(self, ids: ir.Value) -> bool:
        """Whether the piece reads what the value holds, not only its shape."""
        if ids not in self.inputs:
            return False
        copy = self.model.graph.inputs[self.inputs.index(ids)]
        return any(not is_op(node, "Shape", "Size") for node in copy.consumers())


def _changes(tensor: ir.TensorProtocol) -> list[int]:
    """Where a table with one axis goes over to another value, if at a few places only."""
    if not _FEW < tensor.size == max(tensor.shape.numpy()):
        return []
    table = tensor.numpy().ravel()
    places = np.flatnonzero(table[1:] != table[:-1]) + 1
    return [int(place) for place in places] if places.size <= _FEW else []


def cut_out(graph: ir.Graph, boundary: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> CutOut:
    """The piece between `boundary` and `outputs`.

    Raises:
        CutError: control flow, or a large constant inside the piece.
    """
    edges = set(boundary)
    nodes, shape_only = _needed_nodes(edges, outputs)
    ordered = [node for node in graph if node in nodes]
    copier = _Copier(graph.opset_imports)
    inputs = [copier.add_input(value) for value in _used_edges(ordered, edges, shape_only)]
    for node in ordered:
        copier.copy(node)
    return CutOut(copier.finish(inputs, outputs), tuple(inputs), frozenset(shape_only))


def _needed_nodes(
    edges: set[ir.Value], outputs: Sequence[ir.Value]
) -> tuple[set[ir.Node], set[ir.Value]]:
    nodes: set[ir.Node] = set()
    shape_only: set[ir.Value] = set()
    pending = [value for value in outputs if value not in edges]
    while pending:
        node = pending.pop().producer()
        if node is None or node in nodes:
            continue
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise CutError(f"node {node.name} ({node.op_type}) holds control flow")
        nodes.add(node)
        for value in node.inputs:
            if value is None or value in edges:
                continue
            if is_op(node, "Shape", "Size") and depends_on_weights(value, edges):
                shape_only.add(value)
            else:
                pending.append(value)
    return nodes, shape_only


def depends_on_weights(value: ir.Value, edges: set[ir.Value]) -> bool:
    """Whether a float matrix takes part in the value's content, boundary values left aside."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current in edges or current in seen:
            continue
        seen.add(current)
        tensor = ir.convenience.get_const_tensor(current)
        if tensor is not None:
            if len(tensor.shape) == 2 and tensor.dtype.is_floating_point():
                return True
            continue
        node = current.producer()
        if node is not None and not is_op(node, "Shape", "Size"):
            pending.extend(value for value in node.inputs if value is not None)
    return False


def _used_edges(
    nodes: Sequence[ir.Node], edges: set[ir.Value], shape_only: set[ir.Value]
) -> list[ir.Value]:
    """Boundary, shape-only and graph-input values that the nodes read, in order of first use."""
    made = {value for node in nodes for value in node.outputs}
    used: dict[ir.Value, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None:
                continue
            outside = value not in made and ir.convenience.get_const_tensor(value) is None
            if value in edges or value in shape_only or outside:
                used[value] = None
    return list(used)


class _Copier:
    """Copies nodes into a new graph, half-precision numbers turned into float32."""

    def __init__(self, opsets: dict[str, int]) -> None:
        self._opsets = dict(opsets)
        self._copies: dict[ir.Value, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []

    def add_input(self, value: ir.Value) -> ir.Value:
        dtype = value.dtype
        if dtype is None or dtype in _HALF:
            dtype = ir.DataType.FLOAT
        self._copies[value] = ir.Value(
            name=f"input_{len(self._copies)}", type=ir.TensorType(dtype), shape=None
        )
        return value

    def copy(self, node: ir.Node) -> None:
        attributes = [_as_float32(attribute) for attribute in node.attributes.values()]
        copied = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else self._copy_of(value) for value in node.inputs],
            attributes,
            num_outputs=len(node.outputs),
            name=f"node_{len(self._nodes)}",
        )
        for index, (old, new) in enumerate(zip(node.outputs, copied.outputs, strict=True)):
            new.name = f"value_{len(self._nodes)}_{index}"
            self._copies.setdefault(old, new)
        self._nodes.append(copied)

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            [self._copies[value] for value in inputs],
            [self._copy_of(value) for value in outputs],
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=self._opsets,
            name="cut_out",
        )
        return ir.Model(graph, ir_version=8)

    def _copy_of(self, value: ir.Value) -> ir.Value:
        if value not in self._copies:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is None:
                raise CutError(f"{value.name} is given to the graph, not computed by it")
            if tensor.nbytes > _MAX_CONSTANT_BYTES:
                raise CutError(f"constant {value.name} of {tensor.nbytes} bytes takes part in it")
            array = constant_array(tensor)
            if tensor.dtype in _HALF:
                array = array.astype(np.float32)
            name = f"constant_{len(self._initializers)}"
            copy = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            self._initializers.append(copy)
            self._copies[value] = copy
        return self._copies[value]


def _as_float32(attribute: ir.Attr) -> ir.Attr:
    """Casts and constants of half precision, as float32; everything else as it is."""
    if attribute.is_ref():
        raise CutError(f"attribute {attribute.name} refers to a function's attribute")
    if attribute.name == "to" and attribute.type == ir.AttributeType.INT:
        to_half = attribute.as_int() in [int(dtype) for dtype in _HALF]
        return ir.AttrInt64("to", int(ir.DataType.FLOAT)) if to_half else attribute
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype in _HALF:
            return ir.AttrTensor(attribute.name, ir.tensor(tensor.numpy().astype(np.float32)))
    return attribute


class OpenCut:
    """A piece in a session, to be run many times."""

    def __init__(self, cut: CutOut, data: bytes | None = None) -> None:
        """`data` stands for the piece's model where that was changed.

        Raises:
            CutError: ONNX Runtime refuses it.
            ExportError: ONNX Runtime is not installed.
        """
        self.cut = cut
        self.data = data or ir.to_proto(cut.model).SerializeToString()
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._names = [value.name for value in cut.model.graph.inputs]
        try:
            self._session = ort.InferenceSession(
                self.data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise _does_not_run(error) from error

    def run(self, feeds: dict[ir.Value, Array]) -> list[Array]:
        """The outputs for the given values of the piece's inputs.

        Raises:
            CutError: ONNX Runtime refuses them; the message holds its first line.
        """
        named = {
            name: feeds[value] for name, value in zip(self._names, self.cut.inputs, strict=True)
        }
        try:
            return [np.asarray(output) for output in self._session.run(None, named)]
        except Exception as error:
            raise _does_not_run(error) from error


def run_cut(cut: CutOut, feeds: dict[ir.Value, Array]) -> list[Array]:
    """The outputs of a piece that is run once; raises as `OpenCut` does."""
    return OpenCut(cut).run(feeds)


def value_sizes(cut: CutOut, feeds: dict[ir.Value, Array]) -> list[int]:
    """Elements of every value that the piece makes, in a run of it; raises as `OpenCut` does."""
    import onnx

    model: onnx.ModelProto = ir.to_proto(cut.model)
    known = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=x) for x in made if x not in known)
    return [int(array.size) for array in OpenCut(cut, model.SerializeToString()).run(feeds)]


def _does_not_run(error: Exception) -> CutRunError:
    first_line = (str(error).splitlines() or [""])[0][:300]
    return CutRunError(f"it does not run on its own: {first_line}")
