"""The operator's border: every impossible call is an ONNX Runtime error with our text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import ATTRIBUTES, TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

from tests.custom_ops.operator_session import (
    ALL_INPUTS,
    Backend,
    attributes_of,
    build_model,
    feeds_of,
    open_session,
)
from tests.custom_ops.tolerances import assert_close

Array = NDArray[Any]
Feeds = dict[str, Array]

BACKEND = Backend(library_path())
ATTENTION = Attention(AttentionShape(4, 2, 16, 24), TrianglePattern(2, 9, 5))
B, S, P, H, G, D, DV = 2, 6, 8, 4, 2, 16, 24


def good_call(seed: int = 0) -> Call:
    """Row 0 has 4 keys before its new tokens, row 1 all 8 of the cache's past."""
    random = np.random.default_rng(seed)

    def normal(*size: int) -> Array:
        return random.standard_normal(size).astype(np.float32)

    return Call(
        normal(B, S, H * D),
        normal(B, S, G * D),
        normal(B, S, G * DV),
        normal(B, G, P, D),
        normal(B, G, P, DV),
        np.array([9, 13], np.int32),
        14,
        np.array([10, 20], np.int32),
        np.array([3, 0], np.int32),
    )


def run(feeds: Feeds, attributes: dict[str, Any] | None = None) -> list[Array]:
    """What the node answers; inputs that are not fed are not connected."""
    absent = frozenset(ALL_INPUTS) - feeds.keys()
    ranks = {name: array.ndim for name, array in feeds.items()}
    model = build_model(attributes or attributes_of(ATTENTION), "float32", absent, ranks)
    outputs: list[Array] = open_session(model, BACKEND).run(None, feeds)
    return outputs


def replaced(**arrays: Array) -> Feeds:
    return {**feeds_of(good_call()), **arrays}


def zeros(*size: int) -> Array:
    return np.zeros(size, np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def test_the_good_call_is_good() -> None:
    expected = triangle_attention(good_call(), ATTENTION)
    assert_close(run(replaced())[0], expected[0], "float32")


BAD_INPUTS: list[tuple[Feeds, str]] = [
    (replaced(query=zeros(B, S)), r"query has shape \[2, 6\].* three dimensions"),
    (replaced(key=zeros(B, S, G, D)), r"key has shape \[2, 6, 2, 16\].* three dimensions"),
    (replaced(value=zeros(S)), r"value has shape \[6\].* three dimensions"),
    (replaced(query=zeros(B, S, 66)), r"query has shape \[2, 6, 66\].* multiple of its 4 heads"),
    (replaced(query=zeros(B, S, H * 12)), r"head size of query is 12.* multiple of 8"),
    (replaced(query=zeros(B, S, H * 264)), r"head size of query is 264.* 8 to 256"),
    (replaced(query=zeros(B, S, 0)), r"head size of query is 0"),
    (replaced(value=zeros(B, S, G * 4)), r"head size of value is 4"),
    (replaced(key=zeros(B, S + 1, G * D)), r"key has shape \[2, 7, 32\].* = \[2, 6, 32\]"),
    (replaced(key=zeros(B, S, G * 8)), r"key has shape \[2, 6, 16\].* = \[2, 6, 32\]"),
    (replaced(value=zeros(1, S, G * DV)), r"value has shape \[1, 6, 48\].* = \[2, 6, 48\]"),
    (replaced(past_key=zeros(B, P, D)), r"past_key has shape \[2, 8, 16\].* four dimensions"),
    (replaced(past_key=zeros(B, H, P, D)), r"past_key has shape .* = \[2, 2, 8, 16\]"),
    (replaced(past_key=zeros(B, G, P, DV)), r"past_key has shape .* = \[2, 2, 8, 16\]"),
    (replaced(past_value=zeros(B, G, P + 1, DV)), r"past_value has shape .* past_key's P"),
    (replaced(seqlens_k=ints(9)), r"seqlens_k has shape \[1\].* = \[2\]"),
    (replaced(seqlens_k=np.array([[9, 13]], np.int32)), r"seqlens_k has shape \[1, 2\]"),
    (replaced(prompt_length=ints(1, 2, 3)), r"prompt_length has shape \[3\].* = \[2\]"),
    (replaced(first_valid=np.int32(0)[None][:0]), r"first_valid has shape \[0\].* = \[2\]"),
    (replaced(total_sequence_length=ints(14, 14)), r"total_sequence_length has shape \[2\]"),
    (replaced(total_sequence_length=np.array(-1, np.int32)), r"is -1, but must be from 0 to 14"),
    (replaced(total_sequence_length=np.array(15, np.int32)), r"is 15, but must be from 0 to 14"),
    (replaced(seqlens_k=ints(9, 14)), r"seqlens_k\[1\] is 14, but must be from -1 to 13"),
    (replaced(seqlens_k=ints(-2, 13)), r"seqlens_k\[0\] is -2"),
    (replaced(seqlens_k=ints(2**31 - 1, 13)), r"seqlens_k\[0\] is 2147483647"),
    (replaced(seqlens_k=ints(-(2**31), 13)), r"seqlens_k\[0\] is -2147483648"),
    (replaced(prompt_length=ints(0, -1)), r"prompt_length\[1\] is -1"),
    (replaced(first_valid=ints(-1, 0)), r"first_valid\[0\] is -1"),
    (replaced(first_valid=ints(11, 0)), r"first_valid\[0\] is 11, but must be from 0 to 10"),
]


@pytest.mark.parametrize(("feeds", "message"), BAD_INPUTS, ids=[m for _, m in BAD_INPUTS])
def test_impossible_inputs_are_refused(feeds: Feeds, message: str) -> None:
    with pytest.raises(ort_errors.InvalidArgument, match="TriangleAttention: .*" + message):
        run(feeds)


def folded(**arrays: Array | None) -> Feeds:
    """The good call, packed and rotating, with keys and values of one size; None: not fed."""
    feeds: dict[str, Array | None] = {
        **feeds_of(good_call()),
        "query": zeros(B, S, (H + 2 * G) * D),
        "key": None,
        "value": None,
        "past_value": zeros(B, G, P, D),
        "cos_cache": zeros(14, D // 2),
        "sin_cache": zeros(14, D // 2),
        **arrays,
    }
    return {name: array for name, array in feeds.items() if array is not None}


def test_the_good_folded_call_is_good() -> None:
    assert run(folded())[0].shape == (B, S, H * D)


BAD_FOLDED: list[tuple[Feeds, str]] = [
    (folded(query=zeros(B, S, 126)), r"packed query has shape \[2, 6, 126\].* of its 8 heads"),
    (folded(query=zeros(B, S, 8 * 12)), r"head size of packed query is 12"),
    (folded(key=zeros(B, S, G * D)), r"key and value go together"),
    (folded(past_value=zeros(B, G, P, DV)), r"past_value has shape .* = \[2, 2, 8, 16\]"),
    (folded(sin_cache=None), r"cos_cache and sin_cache go together"),
    (folded(cos_cache=zeros(14)), r"cos_cache has shape \[14\]"),
    (folded(cos_cache=zeros(14, D)), r"cos_cache has shape \[14, 16\].* of heads of 16"),
    (folded(cos_cache=zeros(14, 0)), r"cos_cache has shape \[14, 0\]"),
    (folded(sin_cache=zeros(15, D // 2)), r"sin_cache has shape \[15, 8\].* = \[14, 8\]"),
    (
        folded(cos_cache=zeros(13, D // 2), sin_cache=zeros(13, D // 2)),
        r"total_sequence_length is 14, but cos_cache has only 13 positions",
    ),
    (
        replaced(cos_cache=zeros(14, D // 2), sin_cache=zeros(14, D // 2)),
        r"keys and values of one size, but they have 16 and 24",
    ),
]


@pytest.mark.parametrize(("feeds", "message"), BAD_FOLDED, ids=[m for _, m in BAD_FOLDED])
def test_impossible_folded_inputs_are_refused(feeds: Feeds, message: str) -> None:
    with pytest.raises(ort_errors.InvalidArgument, match="TriangleAttention: .*" + message):
        run(feeds)


@pytest.mark.parametrize("packed", [False, True])
def test_the_outputs_width_is_known_before_the_call(packed: bool) -> None:
    """From the values' width, or from that of all three in one tensor."""
    feeds = (
        folded()
        if packed
        else folded(query=zeros(B, S, H * D), key=zeros(B, S, G * D), value=zeros(B, S, G * D))
    )
    model = build_model(attributes_of(ATTENTION), "float32", frozenset(ALL_INPUTS) - feeds.keys())
    for value in model.graph.input:
        if value.name in ("query", "key", "value"):
            value.type.tensor_type.shape.dim[2].dim_value = feeds[value.name].shape[2]
    output = open_session(model, BACKEND).get_outputs()[0]
    assert output.shape == ["query_0", "query_1", H * D]


@pytest.mark.parametrize("missing", ["past_key", "past_value"])
def test_half_a_past_is_refused(missing: str) -> None:
    feeds = replaced()
    del feeds[missing]
    with pytest.raises(ort_errors.InvalidArgument, match="go together"):
        run(feeds)


BAD_ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": None}, "attribute num_heads is missing"),
    ({"kv_num_heads": None}, "attribute kv_num_heads is missing"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"kv_num_heads": -1}, "kv_num_heads is -1"),
    ({"kv_num_heads": 3}, "num_heads is 4 and kv_num_heads is 3"),
    ({"scale": float("nan")}, "scale is"),
    ({"scale": float("inf")}, "scale is inf"),
    ({"scale": 1}, "scale is an attribute of another type, but must be a float"),
    ({"softcap": -1.0}, "softcap is -1"),
    ({"softcap": float("nan")}, "softcap is"),
    ({"num_sink_tokens": -1}, "num_sink_tokens is -1"),
    (
        {"num_sink_tokens": 2.0},
        "is an attribute of another type, .* an integer",
    ),
    ({"num_sink_tokens": "2"}, "num_sink_tokens is an attribute of another type"),
    ({"num_sink_tokens": [2, 3]}, "num_sink_tokens is an attribute of another type"),
    ({"sliding_window_size": 0}, "sliding_window_size is 0"),
    ({"sliding_window_size": -2}, "sliding_window_size is -2"),
    ({"num_last_tokens": 0}, "num_last_tokens is 0"),
    ({"rotary_interleaved": 2}, "rotary_interleaved is 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ATTRIBUTES, ids=str)
def test_impossible_attributes_are_refused(changes: dict[str, Any], message: str) -> None:
    attributes = {**attributes_of(ATTENTION), **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    with pytest.raises(ort_errors.RuntimeException, match="TriangleAttention: .*" + message):
        run(replaced(), attributes)


# ------------------------------------------------------- types, which ONNX Runtime checks itself


def test_mixed_types_do_not_load() -> None:
    model = build_model(attributes_of(ATTENTION), "float32")
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises((ort_errors.NotImplemented, ort_errors.Fail), match="TriangleAttention"):
        open_session(model, BACKEND)


def test_lengths_of_another_type_do_not_load() -> None:
    model = build_model(attributes_of(ATTENTION), "float32")
    model.graph.input[5].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises((ort_errors.InvalidGraph, ort_errors.Fail), match="TriangleAttention"):
        open_session(model, BACKEND)


# ------------------------------------------------------------------------------------- shapes


def test_the_output_shape_is_known_before_the_first_call() -> None:
    model = build_model(attributes_of(ATTENTION), "float32")
    model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = G * DV
    shape = open_session(model, BACKEND).get_outputs()[0].shape
    assert shape == ["query_0", "query_1", H * DV]


def test_an_unnamed_dimension_is_no_error() -> None:
    model = build_model(attributes_of(ATTENTION), "float32")
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.Clear()
    expected = triangle_attention(good_call(), ATTENTION)
    assert_close(open_session(model, BACKEND).run(None, replaced())[0], expected[0], "float32")


# ------------------------------------------------------------------------------------- buffers


def test_one_buffer_of_two_shapes_is_refused() -> None:
    call = good_call()
    buffer = zeros(B * G * call.total_sequence_length * D)
    past = buffer[: B * G * P * D].reshape(B, G, P, D)
    present = buffer.reshape(B, G, call.total_sequence_length, D)
    session = open_session(build_model(attributes_of(ATTENTION), "float32"), BACKEND)
    bound = session.io_binding()
    for name, array in {**feeds_of(call), "past_key": past}.items():
        bound.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    bound.bind_output("output")
    bound.bind_ortvalue_output("present_key", ort.OrtValue.ortvalue_from_numpy(present))
    bound.bind_output("present_value")
    with pytest.raises(RuntimeError, match="past_key and present_key are one buffer"):
        session.run_with_iobinding(bound)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_compute_is_no_error(batch: int, length: int) -> None:
    feeds = {
        "query": zeros(batch, length, H * D),
        "key": zeros(batch, length, G * D),
        "value": zeros(batch, length, G * DV),
        "past_key": np.ones((batch, G, P, D), np.float32),
        "past_value": np.ones((batch, G, P, DV), np.float32),
        "seqlens_k": np.full(batch, P - 1, np.int32),
        "total_sequence_length": np.array(P, np.int32),
        "prompt_length": np.full(batch, P, np.int32),
        "first_valid": np.zeros(batch, np.int32),
    }
    output, present_key, present_value = run(feeds)
    assert output.shape == (batch, length, H * DV)
    assert (present_key == feeds["past_key"]).all()
    assert (present_value == feeds["past_value"]).all()


def test_a_row_without_keys_is_zero() -> None:
    feeds = replaced(seqlens_k=ints(-1, 13), first_valid=ints(0, 0))
    assert not run(feeds)[0][0].any()


def test_a_cuda_library_beside_ours_does_not_matter_on_the_cpu(tmp_path: Path) -> None:
    library = shutil.copy(library_path(), tmp_path)
    (tmp_path / "libtrianglemix_cuda.so").write_text("not even a library")
    model = build_model(attributes_of(ATTENTION), "float32")
    session = open_session(model, Backend(Path(library)))
    expected = triangle_attention(good_call(), ATTENTION)
    assert_close(session.run(None, replaced())[0], expected[0], "float32")


# ------------------------------------------------------------- the contract, as far as it shows


@pytest.mark.parametrize("index", range(len(ALL_INPUTS)))
def test_input_names_are_compiled_in_the_order_of_the_contract(index: int) -> None:
    name = ALL_INPUTS[index]
    feeds = replaced() if name in contract.INPUTS else folded()
    array = feeds[name]
    with pytest.raises(ort_errors.InvalidArgument, match=f"{name} has 5 dimensions"):
        run({**feeds, name: array.reshape(array.shape + (1,) * (5 - array.ndim))})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_names_are_those_of_the_contract(name: str) -> None:
    with pytest.raises(ort_errors.RuntimeException, match=f"TriangleAttention: {name} is"):
        run(replaced(), {**attributes_of(ATTENTION), name: "a text"})


def test_attribute_defaults_are_those_of_the_contract() -> None:
    default = Attention(ATTENTION.shape, TrianglePattern())
    length = (default.pattern.exact_length or 0) + 30
    random = np.random.default_rng(1)
    feeds = {
        "query": random.standard_normal((1, length, H * D)).astype(np.float32),
        "key": random.standard_normal((1, length, G * D)).astype(np.float32),
        "value": random.standard_normal((1, length, G * DV)).astype(np.float32),
        "past_key": zeros(1, G, 0, D),
        "past_value": zeros(1, G, 0, DV),
        "seqlens_k": ints(length - 1),
        "total_sequence_length": np.array(length, np.int32),
    }
    heads = {contract.ATTR_NUM_HEADS: H, contract.ATTR_KV_NUM_HEADS: G}
    output = run(feeds, heads)[0]
    assert (output == run(feeds, attributes_of(default))[0]).all()
    for name, value in default.pattern.as_attributes().items():
        other = run(feeds, {**attributes_of(default), name: value + 1})[0]
        assert (output != other).any(), f"{name} has no effect at {length} tokens"


@pytest.mark.parametrize("size", [contract.HEAD_SIZE_STEP, contract.MAX_HEAD_SIZE])
def test_head_sizes_reach_the_limits_of_the_contract(size: int) -> None:
    shape = AttentionShape(1, 1, size, size)
    feeds = {
        "query": zeros(1, 2, size),
        "key": zeros(1, 2, size),
        "value": np.ones((1, 2, size), np.float32),
        "seqlens_k": ints(1),
        "total_sequence_length": np.array(2, np.int32),
    }
    attributes = attributes_of(Attention(shape, TrianglePattern()))
    assert (run(feeds, attributes)[0] == 1).all()
