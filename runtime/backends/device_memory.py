"""Tensors where a session computes: made, zeroed and joined there, without a detour by the host."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from trianglemix.runtime.backends.ort_errors import ORT_ERRORS, execution_error

ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
_NUMPY_TYPES: dict[str, type[np.generic] | int] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": int(TensorProto.BFLOAT16),  # no NumPy type: ONNX Runtime takes ONNX's number
}
_OPSET = 13


class DeviceMemory:
    """Cache tensors of one type on a session's device ("cpu" or "cuda")."""

    def __init__(self, session: ort.InferenceSession, dtype: str, device: str) -> None:
        self._providers = session.get_providers()
        self._dtype = dtype
        self._device = device
        self._joiner: ort.InferenceSession | None = None
        self._zeroer: ort.InferenceSession | None = None

    def empty(self, shape: tuple[int, ...]) -> ort.OrtValue:
        """A tensor that holds anything."""
        dtype = _NUMPY_TYPES[self._dtype]
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device)

    def slots(self, shape: tuple[int, ...]) -> ort.OrtValue:
        """A tensor for slots that may be read before they are written.

        The CPU's kernels never do. On CUDA GroupQueryAttention may read a slot past a row's end
        with weight 0, which times the NaN that old memory can hold is NaN: there it is zeroed.
        """
        return self.empty(shape) if self._device == "cpu" else self.zeros(shape)

    def zeros(self, shape: tuple[int, ...]) -> ort.OrtValue:
        """A tensor of zeros."""
        if self._dtype not in ELEMENT_TYPES:
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), self._device)
        self._zeroer = self._zeroer or self._open(_zeros_model(ELEMENT_TYPES[self._dtype]))
        sizes = ort.OrtValue.ortvalue_from_numpy(np.array(shape, np.int64))
        return self._run(self._zeroer, {"shape": sizes}, shape)

    def joined(self, old: ort.OrtValue, room: ort.OrtValue) -> ort.OrtValue:
        """Both, one after the other along the token axis."""
        self._joiner = self._joiner or self._open(_join_model(ELEMENT_TYPES[self._dtype]))
        batch, heads, slots, size = old.shape()
        shape = (batch, heads, slots + room.shape()[2], size)
        return self._run(self._joiner, {"old": old, "room": room}, shape)

    def _open(self, model: ModelProto) -> ort.InferenceSession:
        return ort.InferenceSession(model.SerializeToString(), providers=self._providers)

    def _run(
        self,
        session: ort.InferenceSession,
        inputs: dict[str, ort.OrtValue],
        shape: tuple[int, ...],
    ) -> ort.OrtValue:
        """The result in memory of its own: a session's arena would take twice as much."""
        result, binding = self.empty(shape), session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("result", result)
        try:
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise execution_error("the KV cache could not be made larger", error) from error
        return result


def _model(
    nodes: list[NodeProto], inputs: list[ValueInfoProto], result: ValueInfoProto
) -> ModelProto:
    graph = helper.make_graph(nodes, "cache", inputs, [result])
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _join_model(element: int) -> ModelProto:
    old, room, result = (
        helper.make_tensor_value_info(name, element, ["B", "G", None, "D"])
        for name in ("old", "room", "result")
    )
    return _model(
        [helper.make_node("Concat", ["old", "room"], ["result"], axis=2)], [old, room], result
    )


def _zeros_model(element: int) -> ModelProto:
    """Through float16 where the type is bfloat16, which ConstantOfShape does not make."""
    made = TensorProto.FLOAT16 if element == TensorProto.BFLOAT16 else element
    zero = helper.make_tensor("value", made, [1], [0.0])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["zeros"], value=zero)]
    nodes.append(helper.make_node("Cast", ["zeros"], ["result"], to=element))
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [None])
    result = helper.make_tensor_value_info("result", element, None)
    return _model(nodes, [shape], result)
