"""T1 on a GPU: the CUDA kernels equal the reference, through ONNX Runtime's CUDA provider."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

from tests.custom_ops.cases import (
    Case,
    Folding,
    Limits,
    cases,
    check_folded,
    folded_cases,
    make_call,
)
from tests.custom_ops.gpu import BUDGET, CUDA, NEEDS_GPU, PROVIDER
from tests.custom_ops.operator_session import (
    ALL_INPUTS,
    Binding,
    attributes_of,
    build_model,
    feeds_of,
    run_call,
)
from tests.custom_ops.tolerances import assert_close

pytestmark = list(NEEDS_GPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_head_size_equals_the_reference(dtype: str) -> None:
    @settings(BUDGET)
    @given(case=cases(dtype))
    def check(case: Case) -> None:
        case.check(CUDA)

    check()


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensor_core_head_sizes_equal_the_reference(dtype: str, size: int) -> None:
    @settings(BUDGET, max_examples=20)
    @given(case=cases(dtype, Limits(1500, 1500)))
    def check(case: Case) -> None:
        shape = dataclasses.replace(case.attention.shape, head_size=size, value_head_size=size)
        attention = dataclasses.replace(case.attention, shape=shape, scale=0.0)
        dataclasses.replace(case, attention=attention).check(CUDA)

    check()


@pytest.mark.parametrize(("size", "scale"), [(64, -0.1), (80, 0.0), (128, -0.1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_large_tiles_equal_the_reference(dtype: str, size: int, scale: float) -> None:
    """Heads and scales that Hopper's own kernel does not take, on rows that fill the GPU.

    Up to 143 multiprocessors: a larger GPU takes the small tiles here.
    """
    shape = AttentionShape(32, 8, size, size)
    attention = Attention(shape, TrianglePattern(20, 300, 64), scale=scale)
    lengths: dict[str, Any] = {"ends": (2500,), "prompt_lengths": (2450,), "first_valid": (130,)}
    shared = Binding(in_place=True)
    Case(attention, dtype, 1, 2300, past_capacity=2600, binding=shared, seed=5, **lengths).check(
        CUDA
    )


@pytest.mark.parametrize("size", [None, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_node_that_rotates_and_unpacks_equals_the_reference(dtype: str, size: int | None) -> None:
    @settings(BUDGET, max_examples=20)
    @given(folded=folded_cases(dtype, Limits(1500, 1500)))
    def check(folded: tuple[Case, Folding]) -> None:
        case, folding = folded
        if size is not None:
            shape = AttentionShape(8, 2, size, size)
            attention = dataclasses.replace(case.attention, shape=shape, scale=0.0)
            case = dataclasses.replace(case, attention=attention)
            folding = dataclasses.replace(folding, rotary_size=min(folding.rotary_size, size))
        check_folded(case, folding, CUDA)

    check()


# -------------------------------------------------------------- lengths that the host never sees


def _case(ends: tuple[int, ...], capacity: int, length: int = 40) -> Case:
    attention = Attention(AttentionShape(8, 2, 128, 128), TrianglePattern(4, 16, 8))
    shared = Binding(in_place=True)
    return Case(attention, "float16", len(ends), length, ends, capacity, None, None, shared, seed=3)


@settings(BUDGET, max_examples=25)
@given(
    garbage=st.integers(-(2**31), 2**31 - 1),
    prompt=st.integers(-(2**31), 2**31 - 1),
    first=st.integers(-(2**31), 2**31 - 1),
)
def test_impossible_lengths_give_zero_rows_and_leave_the_cache(
    garbage: int, prompt: int, first: int
) -> None:
    assume(not -1 <= garbage < 64)  # beside a possible row, one whose end is out of the buffer
    case = _case((40, 40), 64)
    call = dataclasses.replace(
        make_call(case),
        seqlens_k=np.array([39, garbage], np.int32),
        prompt_length=np.array([40, prompt], np.int32),
        first_valid=np.array([0, first], np.int32),
    )
    before = call.past_key[1].copy()
    output, present_key, _ = run_call(call, case.attention, "float16", CUDA, case.binding)
    assert not output[1].any()
    assert np.array_equal(present_key[1].view(np.uint16), before.view(np.uint16))
    possible = make_call(_case((40,), 64))
    alone = dataclasses.replace(
        possible, **{name: getattr(call, name)[:1] for name in ("query", "key", "value")}
    )
    assert_close(output[:1], triangle_attention(alone, case.attention)[0], "float16")


def test_a_captured_graph_follows_growing_lengths() -> None:
    """Capture with one length, replay with longer ones: only device memory changes between."""
    capacity, length = 3000, 4
    case = _case((length,), capacity, length)
    full = make_call(_case((2600,), capacity, length))
    feeds = feeds_of(dataclasses.replace(full, total_sequence_length=capacity))
    absent = frozenset(ALL_INPUTS) - feeds.keys()
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    model = build_model(attributes_of(case.attention), "float16", absent)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=[(PROVIDER, {"enable_cuda_graph": "1"})]
    )
    live = np.nan_to_num(full.past_key), np.nan_to_num(full.past_value)
    feeds["past_key"], feeds["past_value"] = live
    binding, values = session.io_binding(), dict[str, Any]()
    for name, array in feeds.items():
        device = "cpu" if name == "total_sequence_length" else "cuda"
        values[name] = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
        binding.bind_ortvalue_input(name, values[name])
    values["output"] = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(full.query), "cuda", 0)
    shared = {"present_key": "past_key", "present_value": "past_value"}
    for name in contract.OUTPUTS:
        binding.bind_ortvalue_output(name, values[shared.get(name, name)])
    for end in (length, 300, 1200, 2600):
        values["seqlens_k"].update_inplace(np.array([end - 1], np.int32))
        session.run_with_iobinding(binding)
        call = Call(
            full.query, full.key, full.value, *live, np.array([end - 1], np.int32), capacity
        )
        expected, present_key, present_value = triangle_attention(call, case.attention)
        assert_close(values["output"].numpy(), expected, "float16", f"output at {end}")
        live = present_key, present_value
