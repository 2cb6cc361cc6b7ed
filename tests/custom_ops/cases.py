"""Random calls of the operator, for every kernel and provider: shapes, lengths, paddings, caches.

All bits that must not matter are NaN: slots before `first_valid` and from the row's end on, and
the queries of rows that keep no key.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from trianglemix.custom_ops.contract import DENSE_WINDOW, AttentionShape
from trianglemix.custom_ops.reference import Call, start_position
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

from tests.custom_ops.operator_session import Backend, Binding, run_call
from tests.custom_ops.tolerances import assert_close, assert_same_bits

Array = NDArray[Any]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type of a dtype's name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@dataclass(frozen=True)
class Case:
    """One call, how its buffers are bound, and its dtype. Prints as the numbers that made it."""

    attention: Attention
    dtype: str
    batch: int
    length: int  # S
    ends: tuple[int, ...]  # L of each row
    past_capacity: int  # P
    prompt_lengths: tuple[int, ...] | None
    first_valid: tuple[int, ...] | None
    binding: Binding
    seed: int
    call: Call = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", make_call(self))

    def check(self, backend: Backend) -> None:
        """Runs the call and compares output and cache with the reference."""
        actual = run_call(self.call, self.attention, self.dtype, backend, self.binding)
        expected = triangle_attention(self.call, self.attention)
        assert_same_bits(actual[1], expected[1], "present_key")
        assert_same_bits(actual[2], expected[2], "present_value")
        assert_close(actual[0], expected[0], self.dtype)


def make_call(case: Case) -> Call:
    """Unit-normal inputs of a case, NaN in everything dead."""
    random = np.random.default_rng(case.seed)
    shape, dtype = case.attention.shape, numpy_dtype(case.dtype)
    b, s, g, p = case.batch, case.length, shape.kv_num_heads, case.past_capacity

    def normal(*size: int) -> Array:
        return random.standard_normal(size).astype(dtype)

    query = normal(b, s, shape.num_heads * shape.head_size)
    key, value = normal(b, s, g * shape.head_size), normal(b, s, g * shape.value_head_size)
    past_key = normal(b, g, p, shape.head_size)
    past_value = normal(b, g, p, shape.value_head_size)
    for row, end in enumerate(case.ends):
        start = start_position(end, s)
        first = case.first_valid[row] if case.first_valid else 0
        tokens = start + np.arange(s)
        dead_tokens = (tokens < first) | (tokens >= end)
        slots = np.arange(p)
        dead_slots = (slots < first) | (slots >= start)
        for array in (query, key, value):
            array[row, dead_tokens] = np.nan
        for array in (past_key, past_value):
            array[row, :, dead_slots] = np.nan
    return Call(
        query,
        key,
        value,
        past_key,
        past_value,
        np.array(case.ends, np.int32) - np.int32(1),
        max(case.ends),
        _int32(case.prompt_lengths),
        _int32(case.first_valid),
    )


def _int32(values: tuple[int, ...] | None) -> Array | None:
    return None if values is None else np.array(values, np.int32)


@dataclass(frozen=True)
class Folding:
    """What else the node does: turns a part of each head (0: none), and takes one packed tensor."""

    rotary_size: int
    interleaved: bool
    packed: bool


def fold(case: Case, folding: Folding) -> tuple[Call, Attention]:
    """The case as a call of a node that rotates, unpacks or both. Its head sizes are one."""
    call, attention = case.call, case.attention
    random = np.random.default_rng(case.seed + 1)
    if folding.rotary_size:
        positions = call.total_sequence_length + int(random.integers(0, 3))
        angles = random.uniform(-np.pi, np.pi, (positions, folding.rotary_size // 2))
        dtype = numpy_dtype(case.dtype)
        tables = {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}
        call = replace(call, **{name: table.astype(dtype) for name, table in tables.items()})
        attention = replace(attention, rotary_interleaved=folding.interleaved)
    if folding.packed:
        packed = np.concatenate([call.query, call.key, call.value], axis=-1)
        call = replace(call, query=packed, key=None, value=None)
    return call, attention


def check_folded(case: Case, folding: Folding, backend: Backend) -> None:
    """Runs the folded call and compares output and cache with the reference."""
    call, attention = fold(case, folding)
    actual = run_call(call, attention, case.dtype, backend, case.binding)
    expected = triangle_attention(call, attention)
    dead = np.isnan(expected[1])
    assert (np.isnan(actual[1]) == dead).all()
    assert_close(actual[1][~dead], expected[1][~dead], case.dtype, "present_key")  # turned: rounded
    assert_same_bits(actual[2], expected[2], "present_value")
    assert_close(actual[0], expected[0], case.dtype)


# ------------------------------------------------------------------------------- strategies

HEAD_SIZES = st.integers(1, 32).map(lambda step: 8 * step)


def patterns(longest: int = 700) -> st.SearchStrategy[TrianglePattern]:
    """Patterns that drop something at these lengths, and those that drop nothing."""
    count = st.one_of(st.integers(1, 40), st.integers(1, longest))
    return st.builds(
        TrianglePattern,
        num_sink_tokens=st.one_of(st.integers(0, 20), st.integers(0, longest)),
        sliding_window_size=st.one_of(count, count, st.just(DENSE_WINDOW)),
        num_last_tokens=count,
    )


@st.composite
def attentions(draw: st.DrawFn, longest: int = 700) -> Attention:
    """Head layouts (at most 21 query heads), patterns, scales near `1/sqrt(D)`, softcaps."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 7]))
    shape = AttentionShape(kv_heads * group, kv_heads, draw(HEAD_SIZES), draw(HEAD_SIZES))
    share = draw(st.sampled_from([0.0, 0.0, 0.5, 1.4]))
    softcap = draw(st.sampled_from([0.0, 0.0, 0.0, 5.0, 30.0]))
    return Attention(shape, draw(patterns(longest)), share * shape.head_size**-0.5, softcap)


@dataclass(frozen=True)
class Limits:
    """Sizes of the calls to draw: tokens of a row, new tokens of a call, optional inputs."""

    tokens: int = 700
    new_tokens: int = 700
    all_inputs: bool = False  # the function body needs every input connected


WHOLE_CALLS = Limits()


@st.composite
def cases(draw: st.DrawFn, dtype: str = "float32", limits: Limits = WHOLE_CALLS) -> Case:
    """Prompts, later chunks and decode steps, ragged and padded on either side; see the module."""
    attention, batch = draw(attentions(limits.tokens)), draw(st.integers(1, 3))
    most = limits.new_tokens
    length = draw(st.integers(1, min(4, most)) | st.integers(1, most // 5) | st.integers(1, most))
    ends = draw(_row_ends(batch, length, limits.tokens))
    needed = max(start_position(end, length) for end in ends)
    past = draw(st.sampled_from([needed, max(ends), max(ends) + 5, needed + 3]))
    may_share = past >= max(ends) and past > 0
    may_omit = past == 0 and not limits.all_inputs
    first_valid = st.tuples(*(st.integers(0, max(0, end - 1)) for end in ends))
    prompt_lengths = _prompt_lengths(ends)
    if not limits.all_inputs:
        first_valid, prompt_lengths = st.none() | first_valid, st.none() | prompt_lengths
    return Case(
        attention,
        dtype,
        batch,
        length,
        ends,
        past,
        draw(prompt_lengths),
        draw(first_valid),
        Binding(may_share and draw(st.booleans()), may_omit and draw(st.booleans())),
        draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def folded_cases(
    draw: st.DrawFn, dtype: str = "float32", limits: Limits = WHOLE_CALLS
) -> tuple[Case, Folding]:
    """Cases of one head size, whose node rotates, unpacks or both."""
    case = draw(cases(dtype, limits))
    shape = replace(case.attention.shape, value_head_size=case.attention.shape.head_size)
    rotary_size = draw(
        st.sampled_from([0, shape.head_size, shape.head_size])
        | st.integers(1, shape.head_size // 2).map(lambda half: 2 * half)
    )
    packed = draw(st.booleans()) if rotary_size else True
    folding = Folding(rotary_size, draw(st.booleans()), packed)
    return replace(case, attention=replace(case.attention, shape=shape)), folding


def _row_ends(batch: int, length: int, longest: int) -> st.SearchStrategy[tuple[int, ...]]:
    """L of each row: a past before the new tokens, or right padding behind them."""
    later = st.integers(length, max(length, longest))
    padded = st.integers(1, length)
    rows = st.one_of(st.just(length), later, padded, padded | later)
    return st.tuples(*[rows] * batch)


def _prompt_lengths(ends: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """The end of a prompt that goes on, or a stale value of an earlier turn."""
    ahead = st.tuples(*(st.integers(end, end + 200) for end in ends))
    stale = st.tuples(*(st.integers(0, end) for end in ends))
    return ahead | stale
