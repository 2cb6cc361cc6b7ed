"""A float16 copy of a tiny float32 model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def load_whole(source: Path) -> onnx.ModelProto:
    """A model with its weights, from a copy: onnx refuses data files that exports are linked to."""
    with tempfile.TemporaryDirectory() as folder:
        for file in source.parent.glob("model.onnx*"):
            shutil.copy(file, folder)
        return onnx.load(Path(folder) / source.name)


def save_half(source: Path, target: Path, weight_factor: float = 1.0) -> Path:
    """All float32 tensors of a graph become float16; query weights are multiplied by the factor."""
    model = load_whole(source)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if "qkv_proj.MatMul" in tensor.name:
                array = array * np.float32(weight_factor)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target)
    return target
