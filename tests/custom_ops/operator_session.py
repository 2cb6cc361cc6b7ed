"""One `TriangleAttention` node in a model of its own, run by ONNX Runtime on any provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.custom_ops.triangle.function_body import build_function
from trianglemix.custom_ops.triangle.reference import Attention

Array = NDArray[Any]

ELEMENT_TYPES: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
ALL_INPUTS: Final = (*contract.INPUTS, *contract.ROTARY_INPUTS)
_INTEGERS: Final = frozenset({"seqlens_k", "total_sequence_length", "prompt_length", "first_valid"})
_RANKS: Final = {
    "query": 3, "key": 3, "value": 3, "past_key": 4, "past_value": 4, "seqlens_k": 1,
    "total_sequence_length": 0, "prompt_length": 1, "first_valid": 1,
    "cos_cache": 2, "sin_cache": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """Who runs the node: a provider with our library, or the function body where it is None."""

    library: Path | None
    provider: str = "CPUExecutionProvider"

    @property
    def providers(self) -> tuple[str, ...]:
        """The provider, and the CPU for what it leaves over."""
        return tuple(dict.fromkeys((self.provider, "CPUExecutionProvider")))

    @property
    def device(self) -> str:
        return "cuda" if self.provider.startswith("CUDA") else "cpu"


def attributes_of(attention: Attention) -> dict[str, int | float]:
    """The node's attributes: all canonical ones, and how it rotates where that is not as usual."""
    shape = attention.shape
    rotation = {contract.ATTR_INTERLEAVED: 1} if attention.rotary_interleaved else {}
    return {
        contract.ATTR_NUM_HEADS: shape.num_heads,
        contract.ATTR_KV_NUM_HEADS: shape.kv_num_heads,
        contract.ATTR_SCALE: float(attention.scale),
        contract.ATTR_SOFTCAP: float(attention.softcap),
        **rotation,
        **attention.pattern.as_attributes(),
    }


def build_model(
    attributes: Mapping[str, Any],
    dtype: str,
    absent: frozenset[str] = frozenset(contract.ROTARY_INPUTS),
    ranks: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model of one node with dynamic shapes; inputs named in `absent` are not connected.

    It carries the function body too where it can: the body needs `contract.INPUTS`, all of them.
    """
    ranks = {**_RANKS, **(ranks or {})}
    element = ELEMENT_TYPES[dtype]
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT32 if name in _INTEGERS else element,
            [f"{name}_{axis}" for axis in range(ranks[name])],
        )
        for name in ALL_INPUTS
    ]
    connected = ["" if name in absent else name for name in ALL_INPUTS]
    while not connected[-1]:
        connected.pop()
    node = helper.make_node(
        OP_TYPE, connected, list(contract.OUTPUTS), domain=contract.DOMAIN, **attributes
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [value for value in inputs if value.name not in absent],
        [helper.make_tensor_value_info(name, element, None) for name in contract.OUTPUTS],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(contract.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if absent == frozenset(contract.ROTARY_INPUTS):
        model.functions.append(ir.to_proto(build_function()))
    return model


def open_session(model: onnx.ModelProto, backend: Backend) -> ort.InferenceSession:
    """A session with two threads; the library is registered where the backend names one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    if backend.library is not None:
        options.register_custom_ops_library(str(backend.library))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=list(backend.providers)
    )


def feeds_of(call: Call) -> dict[str, Array]:
    """The call's arrays by input name; absent ones are left out."""
    arrays = {name: getattr(call, name) for name in ALL_INPUTS}
    arrays["total_sequence_length"] = np.array(call.total_sequence_length, np.int32)
    return {name: array for name, array in arrays.items() if array is not None}


@dataclass(frozen=True)
class Binding:
    """How a call's buffers are bound. `in_place`: present is the past's buffer (P is T).

    `past_absent`: a past of no slots is left out instead of bound.
    """

    in_place: bool = False
    past_absent: bool = False


COPIED: Final = Binding()


def run_call(
    call: Call, attention: Attention, dtype: str, backend: Backend, binding: Binding = COPIED
) -> tuple[Array, Array, Array]:
    """Output and present of one call, in the call's dtype. Buffers for them hold NaN before."""
    feeds = feeds_of(call)
    absent = frozenset(ALL_INPUTS) - feeds.keys()
    if binding.past_absent:
        absent |= {"past_key", "past_value"}
    session = open_session(build_model(attributes_of(attention), dtype, absent), backend)
    bound = session.io_binding()
    buffers: dict[str, Buffer] = {}
    for name, array in feeds.items():
        if name not in absent:
            on_host = name == "total_sequence_length"
            buffers[name] = Buffer(array.copy(), "cpu" if on_host else backend.device)
            bound.bind_ortvalue_input(name, buffers[name].value)
    for name, shape in zip(contract.OUTPUTS, output_shapes(call, attention), strict=True):
        past = name.replace("present", "past")
        if binding.in_place and past in buffers:
            buffers[name] = buffers[past]
        else:
            buffers[name] = Buffer(np.full(shape, np.nan, call.query.dtype), backend.device)
        bound.bind_ortvalue_output(name, buffers[name].value)
    session.run_with_iobinding(bound)
    output, present_key, present_value = (buffers[name].read() for name in contract.OUTPUTS)
    return output, present_key, present_value


def output_shapes(call: Call, attention: Attention) -> tuple[tuple[int, ...], ...]:
    """Shapes of output, present key and present value, as the contract has them."""
    shape, (batch, length) = attention.shape, call.query.shape[:2]
    slots = max(call.past_key.shape[2], call.total_sequence_length)
    return (
        (batch, length, shape.num_heads * shape.value_head_size),
        (batch, shape.kv_num_heads, slots, shape.head_size),
        (batch, shape.kv_num_heads, slots, shape.value_head_size),
    )


class Buffer:
    """An array where the provider computes: on the host the array itself, on a device its copy."""

    def __init__(self, array: Array, device: str) -> None:
        self.array = array  # an OrtValue does not keep it alive
        self.on_host = device == "cpu" or array.dtype.name == "bfloat16"
        if array.dtype.name == "bfloat16":  # NumPy itself has none: hand over the bits
            bits = array.view(np.uint16)
            self.value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
        else:
            self.value = ort.OrtValue.ortvalue_from_numpy(array, device, 0)

    def read(self) -> Array:
        return self.array if self.on_host else self.value.numpy()
