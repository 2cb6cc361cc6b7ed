"""A clean graph for Ascend, and what may be wrong with it: each fault, its rule and its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.targets.ascend.block_form import StaticCall

from tests.custom_ops.block_form_case import Case, build

SLOTS = 160
Model = onnx.ModelProto


def clean(dtype: type = np.float16, opset: int = 18) -> Model:
    """A banded attention of 96 rows over a cache of 160 slots."""
    case = Case(
        StaticCall(96, SLOTS, 32, 32),
        Attention(AttentionShape(4, 2, 16, 16), TrianglePattern(8, 40, 16)),
        start=64,
        banded=True,
        dtype=dtype,
    )
    return ir.to_proto(build(case, opset))


def _opset_19(m: Model) -> str:
    m.opset_import[0].version = 19
    return "block_form"


def _opset_10(m: Model) -> str:
    m.opset_import[0].version = 10
    return "block_form"


def _append(m: Model, op_type: str, name: str, domain: str = "", **attributes: object) -> None:
    """A node that reads the graph's first output."""
    m.graph.node.append(
        helper.make_node(
            op_type, [m.graph.output[0].name], [f"{name}_out"], name=name, domain=domain,
            **attributes,
        )
    )  # fmt: skip


def _loop(m: Model) -> str:
    body = helper.make_graph([], "body", [], [])
    _append(m, "Loop", "a_loop", body=body)
    return "a_loop"


def _attention(m: Model) -> str:
    _append(m, "Attention", "fused")
    return "fused"


def _microsoft(m: Model) -> str:
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    _append(m, "GroupQueryAttention", "gqa", "com.microsoft", num_heads=4)
    return "gqa"


def _retired(m: Model) -> str:
    _append(m, "ReduceL2", "norm", keepdims=1)
    return "norm"


def _triangle_version_2(m: Model) -> str:
    m.opset_import.append(helper.make_opsetid("trianglemix", 2))
    _append(m, "TriangleAttention", "triangle", "trianglemix")
    return "triangle"


def _other_of_the_domain(m: Model) -> str:
    m.opset_import.append(helper.make_opsetid("trianglemix", 1))
    _append(m, "SquareAttention", "other", "trianglemix")
    return "other"


def plant_triangle(m: Model, total: int = SLOTS, inputs: int = 9, dtype: type = np.float16) -> str:
    """The operator over a cache of 160 slots, as an export with the custom lowering has it."""
    m.opset_import.append(helper.make_opsetid("trianglemix", 1))
    for name, array in (
        ("rows", np.zeros((1, 96, 64), dtype)),
        ("new", np.zeros((1, 96, 32), dtype)),
        ("past", np.zeros((1, 2, SLOTS, 16), dtype)),
        ("zero", np.zeros(1, np.int32)),
        ("total", np.array([total], np.int32)),
    ):
        m.graph.initializer.append(numpy_helper.from_array(array, name))
    names = ["rows", "new", "new", "past", "past", "zero", "total", "zero", "zero"]
    names[inputs:] = [""] * (len(names) - inputs)
    pattern = TrianglePattern(8, 40, 16).as_attributes()
    node = helper.make_node(
        "TriangleAttention", names, ["out", "present_key", "present_value"], name="triangle",
        domain="trianglemix", num_heads=4, kv_num_heads=2, scale=0.25, softcap=0.0, **pattern,
    )  # fmt: skip
    m.graph.node.append(node)
    for name, dims in (("out", [1, 96, 64]), ("present_key", [1, 2, total, 16]),
                       ("present_value", [1, 2, total, 16])):  # fmt: skip
        m.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, dims))
    return "triangle"


def _growing_present(m: Model) -> str:
    return plant_triangle(m, total=SLOTS + 96)


def _single_precision(m: Model) -> str:
    return plant_triangle(m, dtype=np.float32)


def _fewer_inputs(m: Model) -> str:
    return plant_triangle(m, inputs=7)


def _no_scale(m: Model) -> str:
    place = plant_triangle(m)
    attributes = m.graph.node[-1].attribute
    del attributes[[a.name for a in attributes].index("scale")]
    return place


def _not_imported(m: Model) -> str:
    _append(m, "NPURmsNorm", "rms", "npu")
    return "rms"


def _unused_import(m: Model) -> str:
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return "block_form"


def _function(m: Model) -> str:
    m.functions.append(
        helper.make_function(
            "mine", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
            [helper.make_opsetid("", 18)],
        )
    )  # fmt: skip
    return "mine::Twice"


def _wrong_attribute(m: Model) -> str:
    node = next(n for n in m.graph.node if n.op_type == "Softmax")
    node.attribute.append(helper.make_attribute("temperature", 2.0))
    return node.name


def _axes_as_attribute(m: Model) -> str:
    _append(m, "ReduceMean", "mean", axes=[1])  # an attribute until opset 17 only
    return "mean"


def _same_name(m: Model) -> str:
    m.graph.node[3].name = m.graph.node[2].name
    return m.graph.node[2].name


def _node_like_input(m: Model) -> str:
    m.graph.node[0].name = "start"
    return "start"


def _no_output(m: Model) -> str:
    del m.graph.output[:]
    return "block_form"


def _int4(m: Model) -> str:
    m.graph.initializer.append(helper.make_tensor("packed", TensorProto.INT4, [2], [1, 2]))
    return "packed"


def _colon(m: Model) -> str:
    m.graph.input.append(helper.make_tensor_value_info("past:0", TensorProto.FLOAT16, [1]))
    return "past:0"


def _symbolic(m: Model) -> str:
    m.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    return "query"


def _value_dependent(m: Model) -> str:
    _append(m, "NonZero", "which")
    return "which"


def _empty_past(m: Model) -> str:
    m.graph.input.append(helper.make_tensor_value_info("past", TensorProto.FLOAT16, [1, 2, 0, 16]))
    return "past"


def _bfloat16(m: Model) -> str:
    m.graph.input.append(helper.make_tensor_value_info("wide", TensorProto.BFLOAT16, [1, 4]))
    return "wide"


def _int64_input(m: Model) -> str:
    m.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 4]))
    return "ids"


def plant_external(m: Model, location: str, offset: int) -> str:
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT16, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset))):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    m.graph.initializer.append(tensor)
    return "weight"


def _outside(m: Model) -> str:
    return plant_external(m, "../weights.bin", 0)


def _offset(m: Model) -> str:
    return plant_external(m, "weights.bin", 4096)


def _square(m: Model) -> str:
    m.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, SLOTS, SLOTS]))
    return "mask"


def _nearly_square(m: Model) -> str:
    """Scores of a chunk as long as the cache: no size is the cache's own."""
    dims = [1, SLOTS + 96, 2 * SLOTS]
    m.graph.input.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT16, dims))
    return "scores"


def _square_in_one_axis(m: Model) -> str:
    dims = [1, SLOTS * SLOTS]
    m.graph.input.append(helper.make_tensor_value_info("flat_mask", TensorProto.BOOL, dims))
    return "flat_mask"


def _npu(m: Model, op_type: str, inputs: list[str]) -> str:
    m.opset_import.append(helper.make_opsetid("npu", 1))
    m.graph.node.append(helper.make_node(op_type, inputs, ["npu_out"], name="npu", domain="npu"))
    return "npu"


def _npu_flash(m: Model) -> str:
    return _npu(m, "NPUFlashAttention", ["query"])


def _npu_mask(m: Model) -> str:
    return _npu(m, "NPUPromptFlashAttention", ["query", "key", "value", "", "keep"])


def _reference_card(m: Model) -> str:
    m.graph.initializer.append(numpy_helper.from_array(np.float32([-1e6]), "floor"))
    return "floor"


def _infinity(m: Model) -> str:
    m.graph.initializer.append(numpy_helper.from_array(np.float16([-np.inf]), "floor"))
    return "floor"


def _added(m: Model) -> str:
    softmax = next(n for n in m.graph.node if n.op_type == "Softmax")
    m.graph.initializer.append(numpy_helper.from_array(np.float32([0, -65504]), "levels"))
    m.graph.initializer.append(numpy_helper.from_array(np.int64([1]), "one"))
    at = list(m.graph.node).index(softmax)
    pick = helper.make_node("Gather", ["levels", "one"], ["mask_out"], name="pick")
    add = helper.make_node("Add", [softmax.input[0], "mask_out"], ["masked"], name="add")
    softmax.input[0] = "masked"
    m.graph.node.insert(at, add)
    m.graph.node.insert(at, pick)
    return "add"


def _half_softmax(m: Model) -> str:
    m.graph.node.append(helper.make_node("Softmax", ["query"], ["p"], name="soft", axis=-1))
    return "soft"


@dataclass(frozen=True)
class Fault:
    rule: str
    plant: Callable[[Model], str]
    soc: str = "Ascend910B3"


FAULTS = [
    Fault("opset", _opset_19),
    Fault("opset", _opset_10),
    Fault("operator", _loop),
    Fault("operator", _attention),
    Fault("operator", _microsoft),
    Fault("operator", _retired),
    Fault("domain-version", _triangle_version_2),
    Fault("domain-version", _not_imported),
    Fault("operator", _other_of_the_domain),
    Fault("custom-operator", plant_triangle),
    Fault("custom-chip", plant_triangle, "Ascend310P3"),
    Fault("custom-chip", plant_triangle, "Ascend950PR_9599"),
    Fault("custom-a3", plant_triangle, "Ascend910_9391"),
    Fault("custom-type", _single_precision),
    Fault("custom-wiring", _growing_present),
    Fault("custom-wiring", _fewer_inputs),
    Fault("custom-wiring", _no_scale),
    Fault("mixed-domains", _unused_import),
    Fault("local-function", _function),
    Fault("schema", _wrong_attribute),
    Fault("schema", _axes_as_attribute),
    Fault("duplicate-name", _same_name),
    Fault("duplicate-name", _node_like_input),
    Fault("no-ends", _no_output),
    Fault("parser-type", _int4),
    Fault("input-name", _colon),
    Fault("dynamic-shape", _symbolic),
    Fault("dynamic-value", _value_dependent),
    Fault("zero-size", _empty_past),
    Fault("chip-type", _bfloat16, "Ascend310P1"),
    Fault("int64-input", _int64_input),
    Fault("external-data", _outside),
    Fault("external-offset", _offset),
    Fault("quadratic", _square),
    Fault("quadratic", _nearly_square),
    Fault("quadratic", _square_in_one_axis),
    Fault("flash-attention", _npu_flash),
    Fault("prompt-flash-mask", _npu_mask),
    Fault("half-overflow", _reference_card),
    Fault("half-overflow", _infinity),
    Fault("added-mask", _added),
    Fault("half-softmax", _half_softmax),
]
