"""Random calls of the block-sparse operator, and how a kernel's own choice of blocks is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import (
    BlockSparse,
    block_sparse_attention,
    rows_of,
    tile_sums,
)
from trianglemix.custom_ops.block_sparse.rule import undecided_blocks
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call, rows_and_present, start_position
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.custom_ops.triangle.reference import Attention

from tests.custom_ops.cases import (
    HEAD_SIZES,
    WHOLE_CALLS,
    Case,
    Folding,
    Limits,
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
        mass=st.sampled_from((0.95, 0.8, 0.6, 0.3, 0.95, 0.8, 0.6, 1.0)),
        min_length=st.sampled_from((0, 0, 0, 0, 0, 400)),
        num_sink_tokens=st.sampled_from((8, 0, 130)),
        sliding_window_size=st.sampled_from((128, 1, 128, 1, 300, 128, 1, -1)),
        num_last_tokens=st.sampled_from((1, 60, 128)),
    )


@dataclass(frozen=True)
class _Lengths:
    """New tokens `S`, and of each row L, `first_valid`, N (None: not an input)."""

    length: int
    ends: tuple[int, ...]
    first_valid: tuple[int, ...] | None
    prompt_lengths: tuple[int, ...] | None


@st.composite
def _lengths(draw: st.DrawFn, limits: Limits) -> _Lengths:
    """Prompts and later chunks, some from the edge of a tile on, padded on either side."""
    rows = draw(st.integers(1, 2))
    length = draw(st.integers(min(420, limits.new_tokens), limits.new_tokens))
    most = limits.tokens - length
    ends, firsts = [], []
    for _ in range(rows):
        first = draw(st.sampled_from((0, 1, 77)) | st.integers(0, 200))
        edge = draw(st.integers(0, 3)) * TILE
        before = draw(st.sampled_from((0, 0, first + edge, edge + 5)))
        end = length + min(before, most) - draw(st.sampled_from((0, 0, 0, 1, 90)))
        ends.append(max(end, 1))
        firsts.append(min(first, ends[-1] - 1))
    more = draw(st.sampled_from((300, 0, 1, 300, -200)))
    prompts = tuple(max(0, end + more) for end in ends)
    return _Lengths(
        length,
        tuple(ends),
        draw(st.just(tuple(firsts)) | st.none()),
        draw(st.just(prompts) | st.none()),
    )


@st.composite
def block_sparse_cases(
    draw: st.DrawFn, dtype: str = "float32", limits: Limits = WHOLE_CALLS
) -> BlockSparseCase:
    """Scores that differ enough for a choice; a third of the nodes rotate or unpack."""
    kv_heads, group, size = draw(st.integers(1, 2)), draw(st.sampled_from(GROUPS)), draw(HEAD_SIZES)
    folding, value_size = Folding(0, False, False), draw(HEAD_SIZES)
    if not draw(st.integers(0, 2)):
        value_size = size
        turned = draw(st.sampled_from([size, size // 2, 0]))
        folding = Folding(turned, draw(st.booleans()), draw(st.booleans()))
    shape = AttentionShape(kv_heads * group, kv_heads, size, value_size)
    given = draw(_lengths(limits))
    needed = max(start_position(end, given.length) for end in given.ends)
    past = draw(st.sampled_from([needed, max(given.ends), max(given.ends) + 5]))
    in_place = past >= max(given.ends) and draw(st.booleans())
    case = Case(
        attention=Attention(shape, DENSE_PATTERN),
        dtype=dtype,
        batch=len(given.ends),
        length=given.length,
        ends=given.ends,
        past_capacity=past,
        prompt_lengths=given.prompt_lengths,
        first_valid=given.first_valid,
        binding=Binding(in_place, past == 0),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    scale, softcap = draw(st.sampled_from((2.0, 1.0, 3.0))), draw(st.sampled_from((0.0, 0.0, 8.0)))
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
