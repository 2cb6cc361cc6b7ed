"""What the linter's rules look at, a model, and what they say: a rule, its source, the place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from trianglemix.exporter.targets.ascend.soc import Soc

_LOG = logging.getLogger(__name__)
_LARGEST_CONSTANT: Final = 2**20
_REAL: Final = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)
Dims = tuple[int | None, ...]
Place = tuple[str, str]


@dataclass(frozen=True)
class TensorInfo:
    """Element type and sizes; `dims` None where the rank is unknown, a None where a size is."""

    elem_type: int
    dims: Dims | None

    @property
    def is_static(self) -> bool:
        return self.dims is not None and None not in self.dims


@dataclass(frozen=True)
class LengthAxes:
    """Sizes that grow with the prompt or the cache: from `shortest` on, but for the model's own."""

    shortest: int
    own: frozenset[int] = frozenset()

    def count_in(self, dims: Dims) -> int:
        """How many axes of that length a tensor has; one that is two of them multiplied is two."""
        long = [dim for dim in dims if dim and dim >= self.shortest and dim not in self.own]
        return sum(2 if dim >= self.shortest**2 else 1 for dim in long)


class LintModel:
    """Read once, without weights. A tensor may have one axis of `length_axes`."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        soc: Soc | None = None,
        path: Path | None = None,
        length_axes: LengthAxes | None = None,
    ) -> None:
        self.proto, self.soc, self.path, self.length_axes = proto, soc, path, length_axes
        self.opsets = {_plain(entry.domain): entry.version for entry in proto.opset_import}
        self.nodes = list(_all_nodes(proto.graph))
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.infos = _infos(proto)
        self.constants = dict(self._constants())

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def is_half(self) -> bool:
        """Whether an input, an output or a constant is float16: not a rounding in between alone."""
        ends = [self.infos.get(value.name) for value in (*self.graph.input, *self.graph.output)]
        types = [info.elem_type for info in ends if info is not None]
        types += [tensor.data_type for tensor in self.tensors()]
        return TensorProto.FLOAT16 in types

    def tensors(self) -> Iterator[onnx.TensorProto]:
        """Initializers and the values of Constant nodes."""
        yield from self.graph.initializer
        for node in self.nodes:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t

    def _constants(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Small real-valued constants that lie in the file itself, by value name, as float64."""
        for tensor in self.graph.initializer:
            yield from self._read(tensor.name, tensor)
        for node in self.nodes:
            if node.op_type != "Constant":
                continue
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield from self._read(node.output[0], attribute.t)
                elif attribute.name == "value_float":
                    yield node.output[0], np.array(attribute.f, np.float64)
                elif attribute.name == "value_floats":
                    yield node.output[0], np.array(attribute.floats, np.float64)

    def _read(self, name: str, tensor: onnx.TensorProto) -> Iterator[tuple[str, NDArray[Any]]]:
        is_inside = tensor.data_location != TensorProto.EXTERNAL
        if is_inside and tensor.data_type in _REAL and np.prod(tensor.dims) <= _LARGEST_CONSTANT:
            yield name, numpy_helper.to_array(tensor).astype(np.float64)


def place_of(node: onnx.NodeProto) -> str:
    """A node's name, or what identifies it where it has none."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '?')}"


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


def _infos(proto: onnx.ModelProto) -> dict[str, TensorInfo]:
    """Types and shapes by value name, inferred where the file does not say."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except Exception as error:  # onnx raises its own untyped errors
        _LOG.warning("types and shapes are not inferred, the rules see less: %s", error)
        graph = proto.graph
    found = {
        value.name: TensorInfo(value.type.tensor_type.elem_type, _dims(value.type))
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    for tensor in graph.initializer:
        found[tensor.name] = TensorInfo(tensor.data_type, tuple(tensor.dims))
    return found


def _dims(kind: onnx.TypeProto) -> Dims | None:
    if not kind.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim
    )


class Severity(Enum):
    """ERROR: atc refuses it, or the numbers would be wrong. WARNING: it depends. NOTE: unproven."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


Check = Callable[[LintModel], Iterator[Place]]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong. `check` yields places (a node's or value's name) and texts."""

    name: str
    severity: Severity
    source: str
    check: Check


def rule(name: str, severity: Severity, source: str) -> Callable[[Check], Rule]:
    """Makes a rule of the function that follows; `lint.RULES` finds it in its module."""
    return lambda check: Rule(name, severity, source, check)


@dataclass(frozen=True)
class Finding:
    """One place where a rule is broken."""

    rule: str
    severity: Severity
    place: str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.severity.value} [{self.rule}] {self.place}: {self.message} ({self.source})"
