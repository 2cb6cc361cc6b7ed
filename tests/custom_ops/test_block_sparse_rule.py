"""The block-sparse rule has the properties that its specification claims, and a dense limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import (
    BlockSparse,
    block_sparse_attention,
    choose_blocks,
    rows_of,
    tile_sums,
)
from trianglemix.custom_ops.block_sparse.rule import (
    Rows,
    block_sums,
    forced_blocks,
    kept_blocks,
    threshold,
    undecided_blocks,
)
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.reference import Call, rows_and_present
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

SHAPE = AttentionShape(4, 2, 16, 8)
SMALL = BlockRule(mass=0.6, min_length=0, num_sink_tokens=3, num_last_tokens=5)
SUMS = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


def random_call(length: int, past: int = 0, pads: int = 0, seed: int = 0) -> Call:
    """Queries that look for single keys; `past` tokens were read before, `pads` of them padding."""
    random = np.random.default_rng(seed)
    end = past + length

    def normal(*size: int) -> NDArray[np.float32]:
        return (2 * random.standard_normal(size)).astype(np.float32)

    return Call(
        query=normal(1, length, 4 * 16),
        key=normal(1, length, 2 * 16),
        value=normal(1, length, 2 * 8),
        past_key=normal(1, 2, past, 16),
        past_value=normal(1, 2, past, 8),
        seqlens_k=np.array([end - 1], np.int32),
        total_sequence_length=end,
        first_valid=np.array([pads], np.int32),
    )


@given(SUMS, st.floats(0.01, 1.0))
def test_the_threshold_is_the_largest_that_reaches_the_mass(counts: list[int], mass: float) -> None:
    sums = np.array(counts, np.float64)
    least = threshold(sums, mass)
    assert sums[sums >= least].sum() >= mass * sums.sum()
    assert sums[sums > least].sum() < mass * sums.sum()


@given(SUMS, st.floats(0.05, 0.95), st.floats(0.001, 0.04))
def test_what_is_decided_does_not_depend_on_rounding(
    counts: list[int], mass: float, band: float
) -> None:
    """Block sums that are off by less than the band choose alike but for the undecided blocks."""
    sums, rule = np.array(counts, np.float64), replace(SMALL, mass=mass)
    tile = len(sums) - 1
    off = sums * (1 + band / 4 * np.random.default_rng(len(sums)).uniform(-1, 1, len(sums)))
    differ = kept_blocks(sums, tile, rule) != kept_blocks(off, tile, rule)
    assert not (differ & ~undecided_blocks(sums, tile, rule, band)).any()


def test_forced_blocks_are_sinks_the_diagonal_and_the_window() -> None:
    assert forced_blocks(5, SMALL).tolist() == [True, False, False, False, True, True]
    wide = replace(SMALL, num_sink_tokens=129, sliding_window_size=257)
    assert forced_blocks(5, wide).tolist() == [True, True, False, True, True, True]
    alone = replace(SMALL, num_sink_tokens=0, sliding_window_size=1)
    assert forced_blocks(5, alone).tolist() == [False] * 5 + [True]


def test_sampled_rows_are_eight_of_a_tile_that_the_call_holds() -> None:
    rows = Rows(first_valid=7, start=7 + 40, end=7 + 256, prompt_length=7 + 250)
    assert (rows.sampled(0) - 7).tolist() == [47, 63, 79, 95, 111, 127]
    assert (rows.sampled(1) - 7 - TILE).tolist() == [15, 31, 47, 63, 79, 95, 111]
    assert rows.is_dense(0, SMALL)  # its first row came before
    assert rows.is_dense(1, SMALL)  # it holds last rows


def test_short_prompts_last_rows_and_decode_rows_are_dense() -> None:
    prompt = Rows(0, 0, 1024, 1024)
    assert [t for t in range(8) if prompt.is_dense(t, SMALL)] == [7]
    assert [t for t in range(8) if prompt.is_dense(t, replace(SMALL, num_last_tokens=129))] == [
        6,
        7,
    ]
    assert prompt.is_dense(0, replace(SMALL, min_length=1024))
    assert not prompt.is_dense(0, replace(SMALL, min_length=1023))
    assert Rows(0, 1024, 1025, 1024).is_dense(8, SMALL)


@pytest.mark.parametrize("pads", [0, 77])
def test_mass_one_is_dense_attention(pads: int) -> None:
    call = random_call(700, pads=pads)
    whole = BlockSparse(SHAPE, BlockRule(mass=1, min_length=0), softcap=4.0)
    output, *present, kept = block_sparse_attention(call, whole)
    dense = triangle_attention(call, Attention(SHAPE, DENSE_PATTERN, softcap=4.0))
    for ours, theirs in zip((output, *present), dense, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    causal = np.tri(kept.shape[-1], dtype=bool)
    tiles = -(-(700 - pads) // TILE)
    causal[tiles:] = False
    assert (kept == causal).all()


def test_a_tile_keeps_the_mass_that_its_rows_asked_for_and_drops_something() -> None:
    call, given = random_call(1500), BlockSparse(SHAPE, SMALL)
    kept, rows = choose_blocks(call, given), rows_of(call, 0)
    queries, keys, _ = rows_and_present(call, given)
    dropped = 0
    for tile in range(10):
        for h in range(4):
            sums = tile_sums(queries[0, :, h], keys[0, h // 2], rows, tile, given)
            assert sums.sum() == pytest.approx(8)
            assert sums[kept[0, h, tile, : tile + 1]].sum() >= SMALL.mass * 8
            dropped += int((~kept[0, h, tile, : tile + 1]).sum())
    assert dropped > 20
    assert kept[0, :, 11].sum() == 4 * 12  # the last tile is dense


def test_output_is_attention_over_the_kept_blocks_of_each_head() -> None:
    call, given = random_call(900, pads=30), BlockSparse(SHAPE, SMALL, scale=0.4)
    output, _, values, kept = block_sparse_attention(call, given)
    queries, keys, _ = rows_and_present(call, given)
    for row in (31, 300, 611, 899):
        tile = (row - 30) // TILE
        for h in range(4):
            slots = np.arange(30, row + 1)
            slots = slots[kept[0, h, tile, (slots - 30) // TILE]]
            scores = 0.4 * keys[0, h // 2, slots].astype(np.float64) @ queries[0, row, h]
            shares = np.exp(scores - scores.max())
            want = shares @ values[0, h // 2, slots] / shares.sum()
            np.testing.assert_allclose(output[0, row, 8 * h : 8 * h + 8], want, rtol=1e-9)


@pytest.mark.parametrize("pads", [0, 50])
def test_chunks_at_tile_edges_give_the_rows_of_one_pass(pads: int) -> None:
    whole, given = random_call(1100 + pads, pads=pads), BlockSparse(SHAPE, SMALL)
    output, key, value, kept = block_sparse_attention(whole, given)
    cut = pads + 5 * TILE
    assert whole.key is not None
    assert whole.value is not None
    ends = (0, cut), (cut, 1100 + pads)
    for begin, end in ends:
        part = replace(
            whole,
            query=whole.query[:, begin:end],
            key=whole.key[:, begin:end],
            value=whole.value[:, begin:end],
            past_key=key[:, :, :begin],
            past_value=value[:, :, :begin],
            seqlens_k=np.array([end - 1], np.int32),
            total_sequence_length=end,
            prompt_length=np.array([1100 + pads], np.int32),
        )
        got, _, _, chosen = block_sparse_attention(part, given)
        np.testing.assert_allclose(got, output[:, begin:end], rtol=1e-12, atol=1e-12)
        tiles = slice(max(0, begin - pads) // TILE, -(-(end - pads) // TILE))
        assert (chosen[:, :, tiles] == kept[:, :, tiles, : chosen.shape[-1]]).all()


def test_dead_slots_never_reach_sums_or_output() -> None:
    call, given = random_call(600, past=300, pads=40), BlockSparse(SHAPE, SMALL)
    clean = block_sparse_attention(call, given)
    call.past_key[:, :, :40] = call.past_value[:, :, :40] = np.nan
    spoilt = block_sparse_attention(call, given)
    np.testing.assert_array_equal(spoilt[0], clean[0])
    np.testing.assert_array_equal(spoilt[3], clean[3])


def test_block_sums_are_of_the_blocks_that_begin_at_the_first_key() -> None:
    shares = np.zeros((2, 400))
    shares[0, 10], shares[0, 137], shares[1, 138], shares[1, 399] = 0.25, 0.75, 0.5, 0.5
    assert block_sums(shares, 10, 4).tolist() == [1.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("values", "words"),
    [({"mass": 0.0}, "mass is 0.0"), ({"mass": 1.5}, "mass is 1.5"),
     ({"min_length": -1}, "min_length is -1"), ({"sliding_window_size": 0}, "window_size is 0"),
     ({"num_last_tokens": 0}, "num_last_tokens is 0"), ({"mass": 1e-50}, "mass is 1e-50"),
     ({"min_length": 3.5}, "min_length is 3.5, but must be a whole number"),
     ({"num_sink_tokens": True}, "num_sink_tokens is True"),
     ({"sliding_window_size": 128.0}, "window_size is 128.0"),
     ({"min_length": 2**63}, "must be at most 9223372036854775807")],
)  # fmt: skip
def test_values_out_of_range_are_named(values: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        BlockRule(**values)  # type: ignore[arg-type]


@given(
    st.integers(0, 600), st.sampled_from((0, 8, 128, 300)),
    st.sampled_from((1, 100, 128, 129, 400)), st.integers(1, 300), st.integers(1, 1500),
)  # fmt: skip
def test_up_to_the_exact_length_every_block_is_kept(
    min_length: int, sinks: int, window: int, last: int, length: int
) -> None:
    rule = BlockRule(0.5, min_length, sinks, window, last)
    rows = Rows(0, 0, length, length)
    open_ = [t for t in range(rows.num_tiles) if not rows.is_dense(t, rule)]
    whole = all(forced_blocks(t, rule).all() for t in open_)
    assert rule.exact_length is not None
    assert whole == (length <= rule.exact_length)
    assert BlockRule(mass=1).exact_length is None


def test_a_mass_that_32_bits_round_to_one_is_dense() -> None:
    assert BlockRule(mass=1 - 1e-9).is_dense
    assert not BlockRule(mass=float(np.nextafter(np.float32(1), np.float32(0)))).is_dense
