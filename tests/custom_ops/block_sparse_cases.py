"""Random calls of the block-sparse operator, and how a kernel's own choice of blocks is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.block_sparse.reference import (
    BlockSparse,
    block_sparse_attention,
    rows_of,
    tile_sums,
)
from trianglemix.custom_ops.block_sparse.rule import undecided_blocks
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call, rows_and_present
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.custom_ops.triangle.reference import Attention

from tests.custom_ops.cases import (
    HEAD_SIZES,
    WHOLE_CALLS,
    Case,
    Folding,
    Limits,
    cases,
    fold,
)
from tests.custom_ops.operator_session import Backend, Binding, run_call
from tests.custom_ops.tolerances import BANDS, assert_close, assert_same_bits

Array = NDArray[Any]
GROUPS: Final = (1, 3, 4, 8)
"""Query heads of a key head."""


@dataclass(frozen=True)
class BlockSparseCase:
    """One call of the operator. Prints as the numbers that made it."""

    case: Case  # its attention says the heads alone
    attention: BlockSparse
    folding: Folding

    @property
    def call(self) -> Call:
        """The inputs."""
        return fold(self.case, self.folding)[0]

    def check(self, backend: Backend) -> None:
        """Runs the call; compares cache, blocks, and the output under the blocks it chose."""
        call, dtype = self.call, self.case.dtype
        output, key, value, mask = run_call(call, self.attention, dtype, backend, self.case.binding)
        assert_same_blocks(call, self.attention, mask, dtype)
        want = block_sparse_attention(call, self.attention, mask.astype(bool))
        dead = np.isnan(want[1])
        assert (np.isnan(key) == dead).all()
        assert_close(key[~dead], want[1][~dead], dtype, "present_key")  # turned ones are rounded
        assert_same_bits(value, want[2], "present_value")
        assert_close(output, want[0], dtype)


def assert_same_blocks(call: Call, attention: BlockSparse, got: Array, dtype: str) -> None:
    """Blocks may differ from the reference's where rounding decides, and hold the mass as well."""
    assert set(np.unique(got)) <= {0, 1}
    want, band = block_sparse_attention(call, attention)[3], BANDS[dtype]
    queries, keys, _ = rows_and_present(call, attention)
    group = attention.shape.num_heads // attention.shape.kv_num_heads
    got = got.astype(bool)
    for b, h, tile in {(b, h, t) for b, h, t, _ in np.argwhere(got != want)}:
        rows = rows_of(call, b)
        assert not rows.is_dense(tile, attention.rule), (b, h, tile)
        sums = tile_sums(queries[b, :, h], keys[b, h // group], rows, tile, attention)
        kept = got[b, h, tile, : tile + 1]
        differ = kept != want[b, h, tile, : tile + 1]
        assert not differ[~undecided_blocks(sums, tile, attention.rule, band)].any(), (b, h, tile)
        assert sums[kept].sum() >= (attention.rule.mass - band) * sums.sum(), (b, h, tile)


# ------------------------------------------------------------------------------- strategies


def rules() -> st.SearchStrategy[BlockRule]:
    """Rules that are sparse at a few hundred tokens, and some that are dense."""
    return st.builds(
        BlockRule,
        mass=st.sampled_from((0.3, 0.6, 0.8, 0.95, 0.95, 1.0)),
        min_length=st.sampled_from((0, 0, 0, 400)),
        num_sink_tokens=st.sampled_from((0, 8, 8, 130)),
        sliding_window_size=st.sampled_from((1, 128, 128, 128, 300, -1)),
        num_last_tokens=st.sampled_from((1, 60, 128, 200)),
    )


@st.composite
def block_sparse_cases(
    draw: st.DrawFn, dtype: str = "float32", limits: Limits = WHOLE_CALLS
) -> BlockSparseCase:
    """As `cases`, with scores that differ enough for a choice; a third of them rotate or pack."""
    case = draw(cases(dtype, limits))
    kv_heads, group, size = draw(st.integers(1, 2)), draw(st.sampled_from(GROUPS)), draw(HEAD_SIZES)
    folding = Folding(0, False, False)
    if limits.all_inputs or draw(st.integers(0, 2)):
        value_size = draw(HEAD_SIZES)
    else:
        value_size = size
        turned = draw(st.sampled_from([0, size, size // 2]))
        folding = Folding(turned, draw(st.booleans()), draw(st.booleans()))
    shape = AttentionShape(kv_heads * group, kv_heads, size, value_size)
    case = replace(case, attention=replace(case.attention, shape=shape))
    scale, softcap = draw(st.sampled_from((1.0, 2.0, 3.0))), case.attention.softcap
    attention = BlockSparse(shape, draw(rules()), scale * size**-0.5, softcap, folding.interleaved)
    return BlockSparseCase(case, attention, folding)


def prompt(
    length: int, shape: AttentionShape, dtype: str = "float32", pads: int = 0, seed: int = 0
) -> Call:
    """A whole prompt of one row, without a past."""
    case = Case(
        attention=Attention(shape, DENSE_PATTERN),
        dtype=dtype,
        batch=1,
        length=length,
        ends=(length,),
        past_capacity=0,
        prompt_lengths=None,
        first_valid=(pads,),
        binding=Binding(past_absent=True),
        seed=seed,
    )
    return case.call
