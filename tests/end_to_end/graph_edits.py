"""Small edits of an ONNX file that more than one odd interface needs."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper


def behind_logits(
    proto: onnx.ModelProto, shape: list[Any], kind: str, *more: str, **attributes: Any
) -> None:
    """One more node behind the logits, whose output has their name."""
    producer_node(proto, "logits").output[0] = "rows"
    proto.graph.node.append(helper.make_node(kind, ["rows", *more], ["logits"], **attributes))
    dtype = TensorProto.INT64 if kind == "ArgMax" else TensorProto.FLOAT
    for value in proto.graph.output:
        if value.name == "logits":
            value.CopyFrom(helper.make_tensor_value_info("logits", dtype, shape))


def producer_node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if name in node.output)


def scale_embeddings(proto: onnx.ModelProto, name: str) -> None:
    proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    first = embedding(proto)
    out = first.output[0]
    first.output[0] = "embedded"
    at = list(proto.graph.node).index(first)
    proto.graph.node.insert(at + 1, helper.make_node("Mul", ["embedded", name], [out]))


def embedding(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(x for x in proto.graph.node if x.op_type == "Gather" and x.input[1] == "input_ids")


def appends(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [
        node
        for node in proto.graph.node
        if node.op_type == "Concat" and node.output[0].startswith("present.")
    ]


def rename(proto: onnx.ModelProto, old: str, new: str) -> None:
    """A value inside; an input or output of the graph keeps its declaration."""
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def declare(proto: onnx.ModelProto, name: str, shape: list[Any]) -> None:
    for value in proto.graph.output:
        if value.name == name:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(name, kind, shape))


def producer(proto: onnx.ModelProto, name: str) -> str:
    return next(node.op_type for node in proto.graph.node if name in node.output)
