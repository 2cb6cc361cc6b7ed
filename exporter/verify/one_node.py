"""The block-sparse operator's function body, run alone on the inputs of one layer."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE, OUTPUTS
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.operators import add_function
from trianglemix.custom_ops.reference import Call
from trianglemix.exporter.graph.attention_node import append_operator
from trianglemix.exporter.graph.ort import import_onnxruntime

_IR_VERSION: Final = 9


def run_body(call: Call, attention: BlockSparse) -> tuple[Array, BoolArray]:
    """`output [B, S, H*Dv]` and `block_mask [B, H, C, C]` on ONNX Runtime's CPU provider.

    The call's floats are float32.
    """
    total = np.asarray(call.total_sequence_length, np.int32)
    feeds = {name: getattr(call, name) for name in contract.INPUTS}
    feeds["total_sequence_length"] = total
    inputs = [
        ir.val(name, ir.DataType.from_numpy(array.dtype), [None] * array.ndim)
        for name, array in feeds.items()
    ]
    opsets = {"": contract.FUNCTION_OPSET, contract.DOMAIN: contract.OP_VERSION}
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=opsets, name="one_node")
    build = GraphBuilder(graph, "one_node")
    node = append_operator(build, inputs, attention)
    node.resize_outputs(len(OUTPUTS))
    types = dict.fromkeys(OUTPUTS, ir.DataType.FLOAT) | {OUTPUTS[-1]: ir.DataType.UINT8}
    for value, name in zip(node.outputs, OUTPUTS, strict=True):
        value.name, value.type = name, ir.TensorType(types[name])
    graph.extend(build.nodes)
    graph.outputs.extend(node.outputs)
    model = ir.Model(graph, ir_version=_IR_VERSION)
    add_function(model, OP_TYPE)
    session = import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    output, blocks = session.run([OUTPUTS[0], OUTPUTS[-1]], feeds)
    return output, blocks.astype(bool)
