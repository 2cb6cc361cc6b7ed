"""One node of an attention operator in a model of its own, run by ONNX Runtime on any provider."""

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
from trianglemix.custom_ops import contract, operators
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE as BLOCK_SPARSE
from trianglemix.custom_ops.block_sparse.contract import OUTPUTS as BLOCK_SPARSE_OUTPUTS
from trianglemix.custom_ops.block_sparse.contract import TILE
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import OP_TYPE as TRIANGLE
from trianglemix.custom_ops.triangle.reference import Attention

Array = NDArray[Any]

ELEMENT_TYPES: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
OUTPUTS: Final = {TRIANGLE: contract.OUTPUTS, BLOCK_SPARSE: BLOCK_SPARSE_OUTPUTS}
BLOCK_MASK: Final = BLOCK_SPARSE_OUTPUTS[-1]
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


def op_type_of(attention: Attention | BlockSparse) -> str:
    """The operator whose attributes these are."""
    return BLOCK_SPARSE if isinstance(attention, BlockSparse) else TRIANGLE


def attributes_of(attention: Attention | BlockSparse) -> dict[str, int | float]:
    """The node's attributes: all canonical ones, and how it rotates where that is not as usual."""
    shape = attention.shape
    own = attention.rule if isinstance(attention, BlockSparse) else attention.pattern
    rotation = {contract.ATTR_INTERLEAVED: 1} if attention.rotary_interleaved else {}
    return {
        contract.ATTR_NUM_HEADS: shape.num_heads,
        contract.ATTR_KV_NUM_HEADS: shape.kv_num_heads,
        contract.ATTR_SCALE: float(attention.scale),
        contract.ATTR_SOFTCAP: float(attention.softcap),
        **rotation,
        **own.as_attributes(),
    }


def build_model(
    attributes: Mapping[str, Any],
    dtype: str,
    absent: frozenset[str] = frozenset(contract.ROTARY_INPUTS),
    ranks: Mapping[str, int] | None = None,
    op_type: str = TRIANGLE,
) -> onnx.ModelProto:
    """A model of one node with dynamic shapes; inputs and outputs in `absent` are not connected.

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
    outputs = [name for name in OUTPUTS[op_type] if name not in absent]
    node = helper.make_node(op_type, connected, outputs, domain=contract.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one_node",
        [value for value in inputs if value.name not in absent],
        [
            helper.make_tensor_value_info(
                name, TensorProto.UINT8 if name == BLOCK_MASK else element, None
            )
            for name in outputs
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(contract.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if absent - {BLOCK_MASK} == frozenset(contract.ROTARY_INPUTS):
        with_function = ir.from_proto(model)
        operators.add_function(with_function, op_type)
        model = ir.to_proto(with_function)
    return model


def open_session(
    model: onnx.ModelProto, backend: Backend, threads: int = 2
) -> ort.InferenceSession:
    """A session; the library is registered where the backend names one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
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

    `past_absent`: a past of no slots is left out instead of bound. `mask_absent`: no block mask is
    asked for.
    """

    in_place: bool = False
    past_absent: bool = False
    mask_absent: bool = False


COPIED: Final = Binding()


def run_call(
    call: Call,
    attention: Attention | BlockSparse,
    dtype: str,
    backend: Backend,
    binding: Binding = COPIED,
    threads: int = 2,
) -> tuple[Array, ...]:
    """Outputs of one call, by the contract's order. Buffers for them hold NaN before."""
    feeds = feeds_of(call)
    absent = frozenset(ALL_INPUTS) - feeds.keys()
    if binding.past_absent:
        absent |= {"past_key", "past_value"}
    if binding.mask_absent:
        absent |= {BLOCK_MASK}
    op_type = op_type_of(attention)
    model = build_model(attributes_of(attention), dtype, absent, op_type=op_type)
    session = open_session(model, backend, threads)
    bound = session.io_binding()
    buffers: dict[str, Buffer] = {}
    for name, array in feeds.items():
        if name not in absent:
            on_host = name == "total_sequence_length"
            buffers[name] = Buffer(array.copy(), "cpu" if on_host else backend.device)
            bound.bind_ortvalue_input(name, buffers[name].value)
    outputs = {k: v for k, v in empty_outputs(call, attention).items() if k not in absent}
    for name, array in outputs.items():
        past = name.replace("present", "past")
        if binding.in_place and past in buffers:
            buffers[name] = buffers[past]
        else:
            buffers[name] = Buffer(array, backend.device)
        bound.bind_ortvalue_output(name, buffers[name].value)
    session.run_with_iobinding(bound)
    return tuple(buffers[name].read() for name in outputs)


def empty_outputs(call: Call, attention: Attention | BlockSparse) -> dict[str, Array]:
    """The operator's outputs by name, shaped as the contract has them, of NaN (the mask of 255)."""
    shape, (batch, length) = attention.shape, call.query.shape[:2]
    slots = max(call.past_key.shape[2], call.total_sequence_length)
    tiles = -(-slots // TILE)
    shapes = (
        (batch, length, shape.num_heads * shape.value_head_size),
        (batch, shape.kv_num_heads, slots, shape.head_size),
        (batch, shape.kv_num_heads, slots, shape.value_head_size),
    )
    arrays = [np.full(dims, np.nan, call.query.dtype) for dims in shapes]
    arrays.append(np.full((batch, shape.num_heads, tiles, tiles), 255, np.uint8))
    return dict(zip(OUTPUTS[op_type_of(attention)], arrays, strict=False))


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
