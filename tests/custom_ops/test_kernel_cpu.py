"""T1: each CPU kernel equals the reference, also those that this processor would not choose."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

from tests.custom_ops.cases import (
    Case,
    Folding,
    Limits,
    attentions,
    cases,
    check_folded,
    folded_cases,
)
from tests.custom_ops.operator_session import Backend, Binding, run_call
from tests.custom_ops.tolerances import assert_close, assert_same_bits

BUDGET = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


INSTALLED = Backend(library_path())
FUNCTION_BODY = Backend(None)


@settings(BUDGET, max_examples=60)
@given(case=cases("float32"))
def test_float32_equals_the_reference(kernel: Backend, case: Case) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=20)
@given(case=cases("float16"))
def test_float16_equals_the_reference(kernel: Backend, case: Case) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=25)
@given(case=cases("bfloat16", Limits(200, 200)))
def test_bfloat16_equals_the_reference(kernel: Backend, case: Case) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=30)
@given(case=cases("float32", Limits(tokens=4000, new_tokens=20)))
def test_few_new_tokens_over_a_long_cache_equal_the_reference(kernel: Backend, case: Case) -> None:
    """So many keys that their tiles are cut into pieces, whose results are merged."""
    case.check(kernel)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@settings(BUDGET, max_examples=25)
@given(data=st.data())
def test_a_node_that_rotates_and_unpacks_equals_the_reference(
    dtype: str, data: st.DataObject
) -> None:
    case, folding = data.draw(folded_cases(dtype, Limits(300, 300)))
    check_folded(case, folding, INSTALLED)


@settings(BUDGET, max_examples=15)
@given(folded=folded_cases("float32", Limits(tokens=4000, new_tokens=20)))
def test_prepared_queries_survive_until_all_pieces_of_their_tile_have_read_them(
    folded: tuple[Case, Folding],
) -> None:
    check_folded(*folded, INSTALLED)


@settings(BUDGET, max_examples=20)
@given(case=cases("float32", Limits(300, 300, all_inputs=True)))
def test_the_installed_library_equals_the_function_body(case: Case) -> None:
    case.check(INSTALLED)
    library, body = (
        run_call(case.call, case.attention, case.dtype, backend, case.binding)
        for backend in (INSTALLED, FUNCTION_BODY)
    )
    assert_close(library[0], body[0], case.dtype)
    assert_same_bits(library[1], body[1], "present_key")
    assert_same_bits(library[2], body[2], "present_value")


@st.composite
def chunked_prompts(draw: st.DrawFn) -> tuple[Case, list[int]]:
    """A whole prompt of left-padded rows, and where its chunks end."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 500))
    first_valid = draw(st.tuples(*[st.integers(0, length - 1)] * batch))
    case = Case(
        attention=draw(attentions()),
        dtype="float32",
        batch=batch,
        length=length,
        ends=(length,) * batch,
        past_capacity=0,
        prompt_lengths=(length,) * batch,
        first_valid=first_valid,
        binding=Binding(),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    cuts = draw(st.lists(st.integers(1, length), max_size=5))
    return case, sorted({*cuts, length})


@settings(BUDGET, max_examples=25)
@given(chunked_prompts())
def test_chunks_give_the_rows_of_one_pass(prompt: tuple[Case, list[int]]) -> None:
    case, ends = prompt
    whole, shape = case.call, case.attention.shape
    expected = triangle_attention(whole, case.attention)[0]
    capacity = case.length + 3
    past = (
        np.full((case.batch, shape.kv_num_heads, capacity, shape.head_size), np.nan, np.float32),
        np.full(
            (case.batch, shape.kv_num_heads, capacity, shape.value_head_size), np.nan, np.float32
        ),
    )
    rows, begin = [], 0
    for end in ends:
        chunk = slice(begin, end)
        call = dataclasses.replace(
            whole,
            query=whole.query[:, chunk],
            key=whole.key[:, chunk],
            value=whole.value[:, chunk],
            past_key=past[0],
            past_value=past[1],
            seqlens_k=np.full(case.batch, end - 1, np.int32),
            total_sequence_length=end,
            first_valid=np.minimum(whole.first_valid, end).astype(np.int32),
        )
        row, *past = run_call(call, case.attention, "float32", INSTALLED, Binding(in_place=True))
        rows.append(row)
        begin = end
    assert_close(np.concatenate(rows, axis=1), expected, "float32")


@pytest.mark.parametrize("huge", [2**31, 2**40, 2**63 - 1])
def test_bounds_beyond_all_positions_do_not_overflow(kernel: Backend, huge: int) -> None:
    shape = AttentionShape(2, 1, 8, 8)
    for pattern in (
        TrianglePattern(huge, 3, 2),
        TrianglePattern(2, huge, 2),
        TrianglePattern(2, 3, huge),
    ):
        attention = Attention(shape, pattern)
        Case(attention, "float32", 1, 50, (50,), 0, None, (7,), Binding(), 0).check(kernel)


@pytest.mark.parametrize("length", [1, 20])
def test_a_window_cut_into_pieces_keeps_its_sinks(kernel: Backend, length: int) -> None:
    attention = Attention(AttentionShape(4, 1, 16, 24), TrianglePattern(5, 1500, 3))
    end, prompt_length, first_valid = 4000, 5000, 9
    Case(
        attention,
        "float32",
        1,
        length,
        (end,),
        end - length,
        (prompt_length,),
        (first_valid,),
        Binding(),
        seed=0,
    ).check(kernel)


@pytest.mark.parametrize("length", [1, 60])
def test_a_nan_key_reaches_the_rows_that_keep_it_and_no_other(kernel: Backend, length: int) -> None:
    attention = Attention(AttentionShape(3, 1, 16, 8), TrianglePattern(2, 20, 4))
    case = Case(attention, "float32", 1, length, (100,), 100, (300,), None, Binding(), seed=0)
    position = 100 - length
    case.call.past_key[0, 0, position - 5] = np.nan  # in the window of the first new tokens
    output = run_call(case.call, attention, "float32", kernel)[0]
    expected = triangle_attention(case.call, attention)[0]
    reached = np.isnan(expected).all(axis=-1)[0]
    assert reached.sum() == min(length, 15)
    assert (np.isnan(output).all(axis=-1)[0] == reached).all()
    assert_close(output[:, ~reached], expected[:, ~reached], "float32")
