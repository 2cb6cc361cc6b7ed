"""T1 on a GPU: block-sparse attention equals the reference under the blocks that it chose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from trianglemix.custom_ops.block_sparse.contract import BlockRule

from tests.custom_ops.block_sparse_cases import BlockSparseCase, block_sparse_cases
from tests.custom_ops.cases import Limits
from tests.custom_ops.gpu import BUDGET, CUDA, NEEDS_GPU
from tests.custom_ops.operator_session import run_call
from tests.custom_ops.tolerances import assert_same_bits

pytestmark = list(NEEDS_GPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_head_size_equals_the_reference(dtype: str) -> None:
    @settings(BUDGET)
    @given(case=block_sparse_cases(dtype, Limits(900, 900)))
    def check(case: BlockSparseCase) -> None:
        case.check(CUDA)

    check()


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensor_core_head_sizes_equal_the_reference(dtype: str, size: int) -> None:
    @settings(BUDGET, max_examples=15)
    @given(case=block_sparse_cases(dtype, Limits(1500, 1500)))
    def check(case: BlockSparseCase) -> None:
        with_size(case, size).check(CUDA)

    check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_the_same_bits(dtype: str) -> None:
    @settings(BUDGET, max_examples=10)
    @given(case=block_sparse_cases(dtype, Limits(1500, 1500)))
    def check(case: BlockSparseCase) -> None:
        runs = [
            run_call(case.call, case.attention, dtype, CUDA, case.case.binding) for _ in range(2)
        ]
        for first, second in zip(*runs, strict=True):
            assert_same_bits(first, second, "second run")

    check()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_the_mass_keeps_every_block(dtype: str) -> None:
    @settings(BUDGET, max_examples=10)
    @given(case=block_sparse_cases(dtype))
    def check(case: BlockSparseCase) -> None:
        dense = replace(case.attention, rule=BlockRule(mass=1.0, min_length=0))
        whole = replace(case, attention=dense)
        whole.check(CUDA)
        mask = run_call(case.call, dense, dtype, CUDA, case.case.binding)[-1]
        assert np.array_equal(
            mask, np.tril(np.broadcast_to(mask.max(-1, keepdims=True), mask.shape))
        )

    check()


def with_size(case: BlockSparseCase, size: int) -> BlockSparseCase:
    """The same case with heads of `size`."""
    shape = replace(case.attention.shape, head_size=size, value_head_size=size)
    folding = replace(case.folding, rotary_size=min(case.folding.rotary_size, size))
    own = replace(case.attention, shape=shape, scale=0.0)
    heads = replace(case.case.attention, shape=shape, scale=0.0)
    return replace(case, attention=own, case=replace(case.case, attention=heads), folding=folding)
