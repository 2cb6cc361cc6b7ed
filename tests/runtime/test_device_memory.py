"""Tensors are made where the session computes; here on the CPU, with CUDA's way of zeroing."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto
from trianglemix.runtime.backends.device_memory import ELEMENT_TYPES, DeviceMemory, _zeros_model


@pytest.mark.parametrize("dtype", list(ELEMENT_TYPES))
def test_zeros_are_zeros_of_the_type(dtype: str) -> None:
    model = _zeros_model(ELEMENT_TYPES[dtype]).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    shape = ort.OrtValue.ortvalue_from_numpy(np.array([2, 3, 40, 8], np.int64))
    binding.bind_ortvalue_input("shape", shape)
    binding.bind_output("result")
    session.run_with_iobinding(binding)
    zeros = binding.get_outputs()[0]
    assert zeros.shape() == [2, 3, 40, 8]
    assert zeros.element_type() == ELEMENT_TYPES[dtype]
    if zeros.element_type() != TensorProto.BFLOAT16:
        assert not zeros.numpy().any()


def test_tokens_stay_where_they_were_when_room_is_added() -> None:
    model = _zeros_model(TensorProto.FLOAT).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    memory = DeviceMemory(session, "float32", "cpu")
    old = np.random.default_rng(0).standard_normal((1, 2, 5, 8)).astype(np.float32)
    joined = memory.joined(ort.OrtValue.ortvalue_from_numpy(old), memory.slots((1, 2, 3, 8)))
    assert joined.shape() == [1, 2, 8, 8]
    assert np.array_equal(joined.numpy()[:, :, :5], old)
