"""T1: block-sparse attention on each CPU kernel equals the reference under the chosen blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse, block_sparse_attention
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.custom_ops.triangle.reference import Attention

from tests.custom_ops.block_sparse_cases import (
    BlockSparseCase,
    assert_same_blocks,
    block_sparse_cases,
    prompt,
)
from tests.custom_ops.cases import Case, Folding, Limits
from tests.custom_ops.operator_session import COPIED, Backend, Binding, run_call
from tests.custom_ops.tolerances import assert_close, assert_same_bits

Array = NDArray[Any]
BUDGET = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHAPE = AttentionShape(6, 2, 64, 64)
RULE = BlockRule(mass=0.7, min_length=0)
GIVEN = BlockSparse(SHAPE, RULE, scale=0.3)
INSTALLED = Backend(library_path())


@settings(BUDGET, max_examples=40)
@given(case=block_sparse_cases("float32", Limits(900, 900)))
def test_float32_equals_the_reference(kernel: Backend, case: BlockSparseCase) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=20)
@given(case=block_sparse_cases("float16"))
def test_float16_equals_the_reference(kernel: Backend, case: BlockSparseCase) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=15)
@given(case=block_sparse_cases("bfloat16"))
def test_bfloat16_equals_the_reference(kernel: Backend, case: BlockSparseCase) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=15)
@given(case=block_sparse_cases("float32", Limits(2500, 2500)))
def test_longer_prompts_equal_the_reference(case: BlockSparseCase) -> None:
    case.check(INSTALLED)


@settings(BUDGET, max_examples=10)
@given(case=block_sparse_cases("float32", Limits(4000, 20)))
def test_few_new_tokens_over_a_long_cache_are_dense(case: BlockSparseCase) -> None:
    case.check(INSTALLED)


@pytest.mark.parametrize("group", [16, 17, 40])
def test_groups_of_more_heads_than_a_sample_holds(kernel: Backend, group: int) -> None:
    shape = AttentionShape(group, 1, 16, 8)
    call, given_ = prompt(700, shape), BlockSparse(shape, RULE, scale=1.0)
    *_, mask = run_call(call, given_, "float32", kernel)
    assert_same_blocks(call, given_, mask, "float32")
    assert mask[0, :, 3].sum(axis=-1).min() < 4


@pytest.mark.parametrize("pads", [0, 50])
def test_a_prompt_that_goes_on_samples_the_rows_that_are_here(kernel: Backend, pads: int) -> None:
    """The last tile of each row is cut by its end, and still sparse: the prompt ends later."""
    case = Case(
        attention=Attention(SHAPE, DENSE_PATTERN),
        dtype="float32",
        batch=2,
        length=700,
        ends=(700, 618),
        past_capacity=0,
        prompt_lengths=(2000, 2000),
        first_valid=(pads, pads),
        binding=COPIED,
        seed=5,
    )
    BlockSparseCase(case, GIVEN, Folding(0, False, False)).check(kernel)


def test_something_is_dropped_and_the_last_rows_are_dense(kernel: Backend) -> None:
    *_, mask = run_call(prompt(2000, SHAPE), GIVEN, "float32", kernel)
    causal = np.tri(16, dtype=bool)
    assert not mask[:, :, ~causal].any()
    assert mask[:, :, 14:][:, :, causal[14:]].all()
    assert mask[0, :, 13].sum(axis=-1).max() < 14


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mass_one_is_the_dense_mode_bit_by_bit(kernel: Backend, dtype: str) -> None:
    call = prompt(1500, SHAPE, dtype, pads=77)
    whole = BlockSparse(SHAPE, replace(RULE, mass=1), scale=0.3)
    ours = run_call(call, whole, dtype, kernel)
    dense = run_call(call, Attention(SHAPE, DENSE_PATTERN, 0.3), dtype, kernel)
    for got, want, what in zip(ours[:3], dense, ("output", "key", "value"), strict=True):
        assert_same_bits(got, want, what)


def test_all_blocks_kept_is_dense_attention(kernel: Backend) -> None:
    """A window as wide as the prompt forces every block, but tiles are cut as sparse ones are."""
    call = prompt(1500, SHAPE, pads=77)
    forced = BlockSparse(SHAPE, replace(RULE, sliding_window_size=5000), scale=0.3)
    output, *_, mask = run_call(call, forced, "float32", kernel)
    dense = run_call(call, Attention(SHAPE, DENSE_PATTERN, 0.3), "float32", kernel)
    assert mask.sum() == 6 * 12 * 13 / 2
    assert_close(output, dense[0], "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_same_bits(dtype: str) -> None:
    call = prompt(2100, SHAPE, dtype, pads=5)
    first = run_call(call, GIVEN, dtype, INSTALLED, threads=1)
    for threads in (1, 2, 3, 5):
        again = run_call(call, GIVEN, dtype, INSTALLED, threads=threads)
        for got, want, what in zip(again, first, ("output", "key", "value", "mask"), strict=True):
            assert_same_bits(got, want, f"{what} of {threads} threads")


def test_the_mask_need_not_be_asked_for() -> None:
    call = prompt(1000, SHAPE)
    output, *_, _ = run_call(call, GIVEN, "float32", INSTALLED)
    alone = run_call(call, GIVEN, "float32", INSTALLED, Binding(mask_absent=True))
    assert len(alone) == 3
    assert_same_bits(alone[0], output, "output")


@pytest.mark.parametrize("falling", [False, True])
def test_scores_that_overtake_each_other_by_far(kernel: Backend, falling: bool) -> None:
    """Each block's scores dwarf those before it, or are dwarfed by those: up to 2^500 apart."""
    call = prompt(1300, SHAPE)
    ramp = np.linspace(-30, 30, 1300, dtype=np.float32)[:, None] * (-1 if falling else 1)
    assert call.key is not None
    keys = call.key.reshape(1300, 2, 64)
    keys[:, :, 0] = ramp
    call.query.reshape(1300, 6, 64)[:, :, 0] = 20
    output, *_, mask = run_call(call, GIVEN, "float32", kernel)
    assert_same_blocks(call, GIVEN, mask, "float32")
    want = block_sparse_attention(call, GIVEN, mask.astype(bool))[0]
    assert np.isfinite(output).all()
    # Scores of some hundreds lose as many roundings before the exponential.
    assert np.abs(output - want).max() < 1e-3 * np.abs(want).max()


def test_a_nan_key_reaches_only_the_rows_that_keep_it(kernel: Backend) -> None:
    call = prompt(1300, SHAPE)
    assert call.key is not None
    call.key.reshape(1300, 2, 64)[700, 0] = np.nan
    output, *_, mask = run_call(call, GIVEN, "float32", kernel)
    rows = np.isnan(output.reshape(1300, 6, 64)).all(axis=-1)
    assert not rows[:700].any()
    assert not rows[:, 3:].any()
    kept = mask[0, :3, :, 700 // TILE].astype(bool)
    expected = kept[:, np.arange(1300) // TILE].T & (np.arange(1300) >= 700)[:, None]
    assert (rows[:, :3] == expected).all()
    assert not kept[:, 8].any()  # what is not a number chooses nothing


@st.composite
def chunks(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Length of a prompt, its pads, and ends of chunks on edges of its tiles."""
    pads, length = draw(st.integers(0, 200)), draw(st.integers(600, 1500))
    edges = range(pads + TILE, length, TILE)
    ends = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=3, unique=True))
    return length, pads, [*sorted(ends), length]


@settings(BUDGET, max_examples=10)
@given(chunks())
def test_chunks_at_tile_edges_give_the_bits_of_one_pass(cut: tuple[int, int, list[int]]) -> None:
    length, pads, ends = cut
    whole = prompt(length, SHAPE, pads=pads)
    output, _, _, mask = run_call(whole, GIVEN, "float32", INSTALLED)
    past = tuple(np.full((1, 2, length, 64), np.nan, np.float32) for _ in range(2))
    begin = 0
    for end in ends:
        part = chunk(whole, begin, end, past)
        got, *past, kept = run_call(part, GIVEN, "float32", INSTALLED, Binding(in_place=True))
        tiles = slice((max(begin, pads) - pads) // TILE, -(-(end - pads) // TILE))
        assert_same_bits(kept[:, :, tiles], mask[:, :, tiles], f"mask of {begin} to {end}")
        assert not kept[:, :, tiles.stop :].any()
        assert not kept[:, :, : tiles.start].any()
        sparse = min(end, pads + (length - RULE.num_last_tokens - pads) // TILE * TILE)
        assert_same_bits(got[:, : sparse - begin], output[:, begin:sparse], "output")
        assert_close(got, output[:, begin:end], "float32")
        begin = end


def chunk(whole: Call, begin: int, end: int, past: tuple[Array, ...]) -> Call:
    """The tokens of a prompt from `begin` to `end`, behind what the cache holds."""
    assert whole.key is not None
    assert whole.value is not None
    length = whole.query.shape[1]
    return replace(
        whole,
        query=whole.query[:, begin:end],
        key=whole.key[:, begin:end],
        value=whole.value[:, begin:end],
        past_key=past[0],
        past_value=past[1],
        seqlens_k=np.array([end - 1], np.int32),
        total_sequence_length=end,
        prompt_length=np.array([length], np.int32),
    )


def test_a_chunk_that_cuts_a_tile_is_denser_never_sparser() -> None:
    whole = prompt(1400, SHAPE)
    *_, mask = run_call(whole, GIVEN, "float32", INSTALLED)
    empty = tuple(np.full((1, 2, 1400, 64), np.nan, np.float32) for _ in range(2))
    _, *past, first = run_call(chunk(whole, 0, 700, empty), GIVEN, "float32", INSTALLED, COPIED)
    *_, second = run_call(chunk(whole, 700, 1400, past), GIVEN, "float32", INSTALLED, COPIED)
    assert_same_blocks(chunk(whole, 0, 700, empty), GIVEN, first, "float32")
    assert_same_bits(first[:, :, :5], mask[:, :, :5], "mask before the cut tile")
    assert second[:, :, 5, :6].all()
    assert_same_bits(second[:, :, 6:], mask[:, :, 6:], "mask behind the cut tile")
