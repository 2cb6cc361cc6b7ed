"""One attention in block form as a model of its own, run on ONNX Runtime beside the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention
from trianglemix.exporter.targets.ascend.block_form import BlockForm, StaticCall, StaticInputs

Array = NDArray[Any]
TOLERANCE: Final = {np.dtype(np.float32): 3e-6, np.dtype(np.float16): 6e-3}
"""Of the largest output. In float16 graphs scores and weights are rounded on the way to float16:
a score of 8 by up to 0.004, which is half a percent of a weight."""


@dataclass(frozen=True)
class Case:
    call: StaticCall
    attention: Attention
    start: int
    banded: bool
    dtype: Any = np.float32
    scale_of_inputs: float = 1.0
    dead_slots: float = 0.0


def build(case: Case, opset: int = 17) -> ir.Model:
    """Inputs query, key, value, past_key, past_value, start; outputs output, new key, new value."""
    s, shape = case.call, case.attention.shape
    g, d, dv = shape.kv_num_heads, shape.head_size, shape.value_head_size
    dtype = ir.DataType.from_numpy(np.dtype(case.dtype))
    dims = {
        "query": (1, s.rows, shape.num_heads * d),
        "key": (1, s.rows, g * d),
        "value": (1, s.rows, g * dv),
        "past_key": (1, g, s.slots, d),
        "past_value": (1, g, s.slots, dv),
    }
    values = {name: ir.val(name, dtype=dtype, shape=size) for name, size in dims.items()}
    start = ir.val("start", dtype=ir.DataType.INT32, shape=(1,))
    graph = ir.Graph(
        [*values.values(), start], [], nodes=[], opset_imports={"": opset}, name="block_form"
    )
    nodes = GraphBuilder(graph, "attention")
    form = BlockForm(nodes, start, s, dtype)
    build_rows = form.banded if case.banded else form.dense
    made = build_rows(StaticInputs(**values), case.attention)
    outputs = [made.output, made.new_key, made.new_value]
    for value, size in zip(
        outputs,
        ((1, s.rows, shape.num_heads * dv), (1, g, s.rows, d), (1, g, s.rows, dv)),
        strict=True,
    ):
        value.dtype, value.shape = dtype, ir.Shape(size)
    graph.outputs.extend(outputs)
    graph.extend(nodes.nodes)
    return ir.Model(graph, ir_version=8)


def inputs(case: Case, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    s, shape = case.call, case.attention.shape
    g, d, dv = shape.kv_num_heads, shape.head_size, shape.value_head_size

    def draw(*size: int) -> Array:
        return rng.standard_normal(size).astype(case.dtype)

    past_key, past_value = draw(1, g, s.slots, d), draw(1, g, s.slots, dv)
    past_key[:, :, case.start :] = past_value[:, :, case.start :] = case.dead_slots
    return {
        "query": draw(1, s.rows, shape.num_heads * d) * case.dtype(case.scale_of_inputs),
        "key": draw(1, s.rows, g * d),
        "value": draw(1, s.rows, g * dv),
        "past_key": past_key,
        "past_value": past_value,
        "start": np.array([case.start], np.int32),
    }


def run(case: Case, feeds: dict[str, Array], opset: int = 17) -> list[Array]:
    proto = ir.to_proto(build(case, opset))
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def expected(case: Case, feeds: dict[str, Array]) -> Array:
    """The reference's output: no row is a last one if banded, every row is if dense."""
    end = case.start + case.call.rows
    last = case.attention.pattern.num_last_tokens
    call = Call(
        feeds["query"], feeds["key"], feeds["value"], feeds["past_key"], feeds["past_value"],
        seqlens_k=np.array([end - 1], np.int32),
        total_sequence_length=end,
        prompt_length=np.array([end + last if case.banded else 0], np.int32),
    )  # fmt: skip
    return triangle_attention(call, case.attention)[0]


def assert_close(got: Array, want: Array) -> None:
    """Fails with the first bad index and both values."""
    limit = TOLERANCE[got.dtype] * np.abs(want).max()
    error = np.abs(got.astype(np.float64) - want)
    if not error.max() <= limit:
        bad = tuple(int(i) for i in np.argwhere(~(error <= limit))[0])
        raise AssertionError(f"at {bad}: {got[bad]} instead of {want[bad]} (limit {limit:.3g})")
