"""T1: the AscendC kernel, run by a host shim that checks every access, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

from tests.custom_ops.ascend_operator import (
    SHIM,
    AscendOperator,
    RefusalError,
    Setting,
    compile_library,
)
from tests.custom_ops.cases import Case, Limits, cases
from tests.custom_ops.operator_session import Binding
from tests.custom_ops.tolerances import assert_close, assert_same_bits

PLAIN = Binding(False, False)
BASE = Case(
    Attention(AttentionShape(4, 2, 64, 64), TrianglePattern(8, 64, 32)),
    "float16", 1, 300, (300,), 0, None, None, PLAIN, 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> AscendOperator:
    folder = tmp_path_factory.mktemp("ascend")
    return AscendOperator(compile_library(SHIM / "run_operator.cc", folder / "operator.so"))


def check(operator: AscendOperator, case: Case, cores: int = 2) -> None:
    """Output and cache against the reference; buffers against what the tiling says of them."""
    outcome = operator(case.call, case.attention, case.dtype, Setting(cores, case.binding.in_place))
    expected = triangle_attention(case.call, case.attention)
    assert_close(outcome.output, expected[0], case.dtype)
    assert_same_bits(outcome.present_key, expected[1], "present_key")
    assert_same_bits(outcome.present_value, expected[2], "present_value")
    assert outcome.taken == outcome.planned


def shaped(heads: int, kv_heads: int, head_size: int, value_size: int | None = None) -> Case:
    """The base call with other heads, of one value size unless another is given."""
    shape = AttentionShape(heads, kv_heads, head_size, value_size or head_size)
    return replace(BASE, attention=replace(BASE.attention, shape=shape))


CALLS = {
    "prompt": BASE,
    "bfloat16": replace(BASE, dtype="bfloat16"),
    "chunk": replace(BASE, length=128, ends=(384,), past_capacity=512, prompt_lengths=(900,)),
    "last-chunk": replace(BASE, length=100, ends=(400,), past_capacity=400),
    "decode": replace(BASE, length=1, ends=(301,), past_capacity=512),
    "ragged": replace(BASE, batch=3, length=130, ends=(130, 77, 1)),
    "ragged-decode": replace(BASE, batch=2, length=1, ends=(301, 17), past_capacity=310),
    "left-pads": replace(BASE, batch=2, ends=(300, 300), first_valid=(0, 150)),
    "only-pads": replace(BASE, batch=2, length=20, ends=(20, 20), first_valid=(20, 3)),
    "growing-cache": replace(BASE, length=60, ends=(200,), past_capacity=140),
    "shared-cache": replace(
        BASE, length=60, ends=(200,), past_capacity=256, binding=Binding(True, False)
    ),
    "dense": replace(BASE, attention=replace(BASE.attention, pattern=DENSE_PATTERN)),
    "long-sinks": replace(
        BASE, attention=replace(BASE.attention, pattern=TrianglePattern(140, 20, 16))
    ),
    "no-sinks": replace(BASE, attention=replace(BASE.attention, pattern=TrianglePattern(0, 1, 1))),
    "softcap": replace(BASE, attention=replace(BASE.attention, softcap=5.0, scale=0.2)),
    "group-of-7": replace(shaped(7, 1, 64), length=150, ends=(150,)),
    "group-of-1": shaped(2, 2, 128),
    "head-96": shaped(2, 1, 96),
    "head-128": replace(shaped(4, 1, 128), dtype="bfloat16"),
    "head-256": replace(shaped(2, 1, 256), length=200, ends=(200,)),
    "values-wider": replace(shaped(2, 1, 16, 160), length=200, ends=(200,)),
    "values-narrower": shaped(2, 1, 192, 48),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_equal_the_reference(operator: AscendOperator, name: str) -> None:
    check(operator, CALLS[name])


@pytest.mark.parametrize("cores", [1, 3, 7])
def test_any_number_of_cores_shares_a_call(operator: AscendOperator, cores: int) -> None:
    check(operator, replace(CALLS["ragged"], prompt_lengths=(130, 300, 1)), cores)


def whole_fractals(case: Case) -> Case:
    """The case with head sizes that the operator takes: multiples of 16."""
    shape = case.attention.shape
    sizes = (-(-size // 16) * 16 for size in (shape.head_size, shape.value_head_size))
    taken = AttentionShape(shape.num_heads, shape.kv_num_heads, *sizes)
    return replace(case, attention=replace(case.attention, shape=taken))


SMALL = Limits(tokens=260, new_tokens=150)
RANDOM = st.sampled_from(["float16", "bfloat16"]).flatmap(lambda dtype: cases(dtype, SMALL))


@settings(max_examples=25, deadline=None)
@given(RANDOM.map(whole_fractals), st.integers(1, 4))
def test_random_calls_equal_the_reference(operator: AscendOperator, case: Case, cores: int) -> None:
    check(operator, case, cores)


def test_large_scores_do_not_overflow(operator: AscendOperator) -> None:
    call = replace(BASE.call, query=BASE.call.query * np.float16(200), key=BASE.call.key * 200)
    outcome = operator(call, BASE.attention, "float16")
    assert_close(outcome.output, triangle_attention(call, BASE.attention)[0], "float16")


@pytest.mark.parametrize("end", [0, -5, 400, 10_000])
def test_impossible_lengths_give_zeros(operator: AscendOperator, end: int) -> None:
    """No key, more keys than slots, a gap before the new tokens: as on other devices."""
    case = replace(BASE, batch=2, length=50, ends=(150, 150), past_capacity=150)
    lengths = np.array([149, end - 1], np.int32)
    outcome = operator(replace(case.call, seqlens_k=lengths), case.attention, "float16")
    expected = triangle_attention(case.call, case.attention)[0]
    assert_close(outcome.output[:1], expected[:1], "float16")
    assert (outcome.output[1] == 0).all()
    assert_same_bits(outcome.present_key[1], case.call.past_key[1], "present_key")


def test_a_call_that_does_not_fit_is_refused(operator: AscendOperator) -> None:
    case = shaped(2, 1, 40)
    with pytest.raises(RefusalError, match="a head size is 40"):
        operator(case.call, case.attention, case.dtype)
