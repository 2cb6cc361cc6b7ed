"""Block-sparse layers in torch: the rule within the tie band, attention over what it kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse as Reference
from trianglemix.custom_ops.block_sparse.reference import (
    block_sparse_attention as reference_attention,
)
from trianglemix.custom_ops.block_sparse.reference import choose_blocks as reference_choice
from trianglemix.custom_ops.block_sparse.reference import rows_of, tile_sums
from trianglemix.custom_ops.block_sparse.rule import Rows as RuleRows
from trianglemix.custom_ops.block_sparse.rule import forced_blocks, threshold, undecided_blocks
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.reference import Call, rows_and_present
from trianglemix.pytorch import block_choice, block_sparse
from trianglemix.pytorch.block_choice import (
    BlockSparse,
    TileSpan,
    choose_blocks,
    choosing_blocks,
    sparse_spans,
)
from trianglemix.pytorch.block_sparse import SPAN_KERNELS, block_sparse_attention
from trianglemix.pytorch.flex import flex_span, kept_block_mask
from trianglemix.pytorch.layout import Rows

from tests.custom_ops.tolerances import BANDS, TOLERANCES, assert_close

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SparseCall:
    """One call for both sides; tensors are `[B, heads, tokens, D]`, rounded to the dtype."""

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    value: Tensor = field(repr=False)
    rows: Rows
    attention: BlockSparse
    call: Call = field(repr=False)
    reference: Reference
    dtype: str

    def check(self, blocks: BoolArray, output: Tensor) -> None:
        """The kept blocks are the rule's but for ties, and the output is attention over them."""
        self.check_blocks(blocks)
        want = reference_attention(self.call, self.reference, blocks)[0]
        B, _, S, _ = output.shape
        got = output.float().numpy().transpose(0, 2, 1, 3).reshape(B, S, -1)
        assert_close(got, want, self.dtype)

    def check_blocks(self, blocks: BoolArray) -> None:
        """No block differs that rounding does not decide."""
        want, band = reference_choice(self.call, self.reference), BANDS[self.dtype]
        queries, keys, _ = rows_and_present(self.call, self.reference)
        group = blocks.shape[1] // keys.shape[1]
        for b, h, tile in {(b, h, t) for b, h, t, _ in np.argwhere(blocks != want)}:
            rows, kept = rows_of(self.call, b), blocks[b, h, tile, : tile + 1]
            sums = tile_sums(queries[b, :, h], keys[b, h // group], rows, tile, self.reference)
            open_ = undecided_blocks(sums, tile, self.attention.rule, band)
            differ = kept != want[b, h, tile, : tile + 1]
            assert not (differ & ~open_).any(), (b, h, tile, sums)
            assert sums[kept].sum() >= (self.attention.rule.mass - band) * sums.sum()
        above = np.triu(np.ones(blocks.shape[-2:], bool), 1)
        assert not blocks[:, :, above].any(), "a block behind the tile's own"


def sparse_call(
    shape: AttentionShape,
    rows: Rows,
    length: int,
    rule: BlockRule,
    *,
    softcap: float = 0.0,
    dtype: str = "float32",
    seed: int = 0,
) -> SparseCall:
    """Queries that look for single keys, NaN before each row's first token."""
    random = torch.Generator().manual_seed(seed)
    batch, end = len(rows.first_valid), rows.start + length

    def normal(heads: int, tokens: int, size: int) -> Tensor:
        values = 1.5 * torch.randn(batch, heads, tokens, size, generator=random)
        return values.to(DTYPES[dtype])

    q = normal(shape.num_heads, length, shape.head_size)
    k = normal(shape.kv_num_heads, end, shape.head_size)
    v = normal(shape.kv_num_heads, end, shape.value_head_size)
    for b, first in enumerate(rows.first_valid):
        k[b, :, :first] = v[b, :, :first] = torch.nan
    scale = 1.5 * shape.head_size**-0.5
    call = Call(
        query=_packed(q),
        key=_packed(k[:, :, rows.start :]),
        value=_packed(v[:, :, rows.start :]),
        past_key=k[:, :, : rows.start].float().numpy(),
        past_value=v[:, :, : rows.start].float().numpy(),
        seqlens_k=np.full(batch, end - 1),
        total_sequence_length=end,
        prompt_length=np.array(rows.prompt_length),
        first_valid=np.array(rows.first_valid),
    )
    reference = Reference(shape, rule, scale, softcap)
    return SparseCall(q, k, v, rows, BlockSparse(rule, scale, softcap), call, reference, dtype)


def _packed(x: Tensor) -> Array:
    return x.float().numpy().transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


RULES = st.builds(
    BlockRule,
    mass=st.sampled_from((0.3, 0.5, 0.7, 0.95, 1.0)),
    min_length=st.sampled_from((0, 0, 0, 400)),
    num_sink_tokens=st.sampled_from((0, 8, 130)),
    sliding_window_size=st.sampled_from((1, 1, 128, 300, 300, -1)),
    num_last_tokens=st.sampled_from((1, 60, 200)),
)


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32",)) -> SparseCall:
    """Ragged and padded batches, whole prompts and chunks of them, decode steps, GQA, softcap."""
    batch = draw(st.integers(1, 3))
    start = draw(st.sampled_from((0, 0, 128, 333, 512)))
    lengths = (st.integers(600, 1000),) * 3
    length = draw(st.one_of(st.just(1), st.integers(2, 400), *lengths))
    end = start + length
    pads = [draw(st.sampled_from((0, 0, 1, 77, 200))) for _ in range(batch)]
    ahead = [draw(st.sampled_from((0, 0, -40, 7, 300))) for _ in range(batch)]
    first = tuple(min(pad, end - 1) for pad in pads)
    rows = Rows(start, first, tuple(max(f + 1, end + n) for f, n in zip(first, ahead, strict=True)))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = AttentionShape(kv_heads * group, kv_heads, 16, 8)
    return sparse_call(
        shape,
        rows,
        length,
        draw(RULES),
        softcap=draw(st.sampled_from((0.0, 0.0, 6.0))),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 999)),
    )


def run(call: SparseCall) -> tuple[BoolArray, Tensor]:
    """Blocks and output; queries of pads are NaN on neither side."""
    arguments = call.query, call.key, call.rows, call.attention
    blocks = choose_blocks(*arguments).numpy()
    return blocks, block_sparse_attention(
        call.query, call.key, call.value, call.rows, call.attention
    )


@given(calls())
@settings(max_examples=40, deadline=None)
def test_rule_and_attention_equal_the_reference(call: SparseCall) -> None:
    call.check(*run(call))


@given(calls(("float16", "bfloat16")))
@settings(max_examples=12, deadline=None)
def test_half_types_equal_the_reference(call: SparseCall) -> None:
    call.check(*run(call))


@given(calls())
@settings(max_examples=15, deadline=None)
def test_flex_equals_the_reference(call: SparseCall) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPAN_KERNELS, "cpu", flex_span)
        call.check(*run(call))


@pytest.mark.parametrize("rows", [640, 600])
def test_the_block_mask_lists_each_heads_blocks(rows: int) -> None:
    """Whole are blocks all of whose pairs are kept, which a compiled kernel does not look into."""
    kept = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(5)) < 0.5
    kept &= torch.ones(5, 7, dtype=torch.bool).tril(2)
    kept[:, :, range(5), range(2, 7)] = True
    span = TileSpan(0, 2000, 0, 256 + rows, 2, 7)
    mask = kept_block_mask(kept, span, (rows, 256 + rows))
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    partial = _listed_tiles(mask.kv_num_blocks, mask.kv_indices)
    whole = _listed_tiles(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial | whole, kept)
    below = kept & torch.ones(5, 7, dtype=torch.bool).tril(1)
    below[:, :, -1] &= rows == 640
    assert torch.equal(whole, below)
    assert not (partial & whole).any()


def _listed_tiles(count: Tensor, index: Tensor) -> Tensor:
    named = (torch.arange(index.shape[-1]) < count[..., None]).to(torch.int32)
    return torch.zeros(index.shape, dtype=torch.int32).scatter_add_(-1, index.long(), named) > 0


@given(calls())
@settings(max_examples=15, deadline=None)
def test_small_pieces_give_the_same(call: SparseCall) -> None:
    blocks, output = run(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_choice, "SCORES", 1)
        patch.setattr(block_sparse, "PAIRS", 1)
        again, other = run(call)
    assert (again == blocks).mean() > 0.999
    if (again == blocks).all():
        torch.testing.assert_close(other, output, atol=2e-6, rtol=1e-5)


@given(st.integers(0, 300), st.integers(0, 900), st.integers(1, 900), st.integers(-50, 900), RULES)
@settings(max_examples=300, deadline=None)
def test_sparse_tiles_are_those_of_the_rule(
    first: int, start: int, length: int, ahead: int, rule: BlockRule
) -> None:
    stop = start + length
    first, prompt = min(first, stop - 1), max(1, stop + ahead)
    ((span, _),) = sparse_spans(Rows(start, (first,), (prompt,)), length, rule)
    rows = RuleRows(first, start, stop, prompt)
    tiles = [t for t in range(rows.num_tiles) if rows.has_rows(t)]
    sparse = [t for t in tiles if not rows.is_dense(t, rule)]
    assert list(range(span.begin, span.end)) == sparse
    if sparse:
        places = np.arange(start, stop)
        looked_at = np.concatenate([rows.sampled(t) for t in sparse])
        assert places[span.sampled()].tolist() == looked_at.tolist()
        in_tiles = (places >= first + TILE * span.begin) & (places < first + TILE * span.end)
        assert places[span.rows].tolist() == places[in_tiles].tolist()


@given(st.integers(0, 8), st.integers(1, 9), st.integers(0, 400), st.integers(1, 600))
@settings(max_examples=200, deadline=None)
def test_forced_blocks_are_those_of_the_rule(
    begin: int, tiles: int, sinks: int, window: int
) -> None:
    edges = sinks // TILE * TILE, window // TILE * TILE + 1
    for numbers in ((sinks, window), edges):
        rule = BlockRule(num_sink_tokens=numbers[0], sliding_window_size=numbers[1])
        tile = torch.arange(begin, begin + tiles)[:, None]
        ours = block_choice.forced_blocks(tile, torch.arange(begin + tiles), rule)
        for row, t in zip(ours, range(begin, begin + tiles), strict=True):
            assert row[: t + 1].tolist() == forced_blocks(t, rule).tolist()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_the_rules(counts: list[int], twentieths: int) -> None:
    """Whole numbers, so that the mass is reached exactly now and then."""
    counts.append(-sum(counts) % 20)
    ours = block_choice.threshold(torch.tensor(counts, dtype=torch.float64), twentieths / 20)
    assert float(ours) == threshold(np.array(counts, float), twentieths / 20)


def test_a_prompt_of_the_least_length_is_dense() -> None:
    for least, tiles in ((900, 0), (899, 6)):
        rows, rule = Rows(0, (100,), (1000,)), replace(PROMPT, min_length=least)
        ((span, _),) = sparse_spans(rows, 1000, rule)
        assert span.end - span.begin == tiles


PROMPT = BlockRule(mass=0.6, min_length=0, num_sink_tokens=3, num_last_tokens=5)
SHAPE = AttentionShape(4, 2, 16, 8)


@pytest.mark.parametrize("pads", [0, 50])
@pytest.mark.parametrize("cut", [512, 556])
def test_chunks_at_tile_edges_give_the_rows_of_one_pass(pads: int, cut: int) -> None:
    """A chunk that begins inside a tile makes that tile dense, and only that one."""
    length, cut = 1100 + pads, cut + pads
    whole = sparse_call(SHAPE, Rows(0, (pads,), (length,)), length, PROMPT)
    output = run(whole)[1]
    pieces = []
    for begin, end in ((0, cut), (cut, length)):
        pieces.append(
            block_sparse_attention(
                whole.query[:, :, begin:end],
                whole.key[:, :, :end],
                whole.value[:, :, :end],
                Rows(begin, (pads,), (length,)),
                whole.attention,
            )
        )
    same = (torch.cat(pieces, 2) - output).abs().amax((0, 1, 3)) < 1e-5
    tile = (torch.arange(length) - pads).div(TILE, rounding_mode="floor")
    assert bool(same[tile != 4].all())
    assert bool(same.all()) == (cut == pads + 512), "the cut tile is dense"


def test_a_chooser_sees_and_replaces_the_blocks() -> None:
    call = sparse_call(SHAPE, Rows(0, (0,), (900,)), 900, PROMPT)
    seen: list[int] = []

    def everything(
        layer: int, query: Tensor, key: Tensor, rows: Rows, attention: BlockSparse
    ) -> Tensor:
        seen.append(layer)
        kept = choose_blocks(query, key, rows, attention)
        return torch.ones_like(kept).tril()

    arguments = call.query, call.key, call.value, call.rows
    with choosing_blocks(everything):
        dense = block_sparse_attention(*arguments, call.attention, layer=7)
    assert seen == [7]
    whole = replace(call.attention, rule=replace(PROMPT, mass=1.0))
    torch.testing.assert_close(dense, block_sparse_attention(*arguments, whole))
    assert (dense - run(call)[1]).abs().max() > 1e-2
    assert seen == [7]


def test_other_devices_are_refused() -> None:
    rows, attention = Rows(0, (0,), (900,)), BlockSparse(PROMPT, 0.3)
    x = torch.empty(1, 2, 900, 8, device="meta")
    with pytest.raises(ConfigurationError, match="on 'meta', but block-sparse layers run"):
        block_sparse_attention(x, x, x, rows, attention)
    whole = replace(attention, rule=BlockRule())  # a short prompt is dense there as anywhere
    assert block_sparse_attention(x, x, x, rows, whole).shape == x.shape


class _Largest(torch.overrides.TorchFunctionMode):
    """The most elements of a tensor that a torch function returned."""

    elements = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_is_bounded() -> None:
    """At 8,192 tokens 4 heads have 2.7e8 pairs; what is held is bounded by two numbers."""
    N = 8192
    q = torch.randn(1, 4, N, 8)
    with pytest.MonkeyPatch.context() as patch, _Largest() as largest:
        patch.setattr(block_choice, "SCORES", 2**21)
        patch.setattr(block_sparse, "PAIRS", 2**23)
        block_sparse_attention(
            q, q[:, :2], q[:, :2], Rows(0, (0,), (N,)), BlockSparse(BlockRule(0.5), 0.3)
        )
    assert largest.elements <= 2**23


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("length", [1000, 4096, 5000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_flex_equals_masked_attention_on_cuda(length: int, dtype: str) -> None:
    shape, rows = AttentionShape(6, 2, 64, 64), Rows(0, (0, 37), (length, length))
    call = sparse_call(shape, rows, length, replace(PROMPT, mass=0.9), dtype=dtype)
    q, k, v = (x.nan_to_num().cuda() for x in (call.query, call.key, call.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sparse, "why_not_kernels", lambda *_: "they have tests of their own")
        flexed = block_sparse_attention(q, k, v, rows, call.attention)
        patch.setitem(SPAN_KERNELS, "cuda", block_sparse.masked_span)
        masked = block_sparse_attention(q, k, v, rows, call.attention)
    share = 1e-3 if dtype == "float32" else TOLERANCES[dtype]  # of products of 19 bits
    torch.testing.assert_close(flexed, masked, atol=share * float(masked.abs().max()), rtol=0)
    if length == 1000:
        call.check_blocks(choose_blocks(q, k, rows, call.attention).cpu().numpy())
