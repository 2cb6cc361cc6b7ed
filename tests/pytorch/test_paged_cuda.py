"""Block-sparse attention by pages on a GPU: the bits that keys in one piece give, and no others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.pytorch.cuda_call import Inputs, run_kernels
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.paged_call import PagedInputs, attend_pages

from tests.custom_ops.tolerances import TOLERANCES
from tests.pytorch.page_pools import LAYOUTS, Strides, beside, paged
from tests.pytorch.test_block_sparse import sparse_call

HOPPER = (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER,
        reason="no Hopper GPU on this machine",
    ),
]
BUDGET = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SIZES = [16, 32, 64, 128]


@dataclass(frozen=True)
class Case:
    """One call, by pages and in one piece: `query [B, H, S, D]`, `key [B, G, T, D]` and `value`."""

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    value: Tensor = field(repr=False)
    ends: list[int]
    prompts: list[int]
    rule: BlockRule
    size: int = 16
    strides: Strides = beside
    apart: bool = False
    softcap: float = 0.0

    def lengths(self) -> list[Tensor]:
        numbers = ([end - 1 for end in self.ends], self.prompts, [0] * len(self.ends))
        return [torch.tensor(x, dtype=torch.int32, device="cuda") for x in numbers]

    def numbers(self) -> dict[str, float]:
        rule = self.rule
        return {
            "sink": rule.num_sink_tokens, "window": rule.sliding_window_size,
            "last": rule.num_last_tokens, "scale": self.query.shape[3] ** -0.5,
            "softcap": self.softcap, "mass": rule.mass, "min_length": rule.min_length,
        }  # fmt: skip

    def mask(self) -> Tensor:
        tiles = -(-self.key.shape[2] // 128)
        return torch.full((*self.query.shape[:2], tiles, tiles), 7, dtype=torch.uint8).cuda()

    def in_one_piece(self) -> tuple[Tensor, Tensor]:
        """Output and chosen blocks of the kernels for keys that lie together."""
        mask = self.mask()
        inputs = Inputs(self.query, self.key, self.value, *self.lengths())
        return run_kernels("block_sparse", inputs, self.numbers(), mask), mask

    def inputs(self, seed: int = 0) -> PagedInputs:
        pages = paged(
            self.key,
            self.value,
            self.ends,
            self.size,
            strides=self.strides,
            apart=self.apart,
            seed=seed,
        )
        ends, prompts, _ = self.lengths()
        return PagedInputs(self.query, pages, ends, prompts, self.key.shape[2])

    def by_pages(self) -> tuple[Tensor, Tensor]:
        """The same by pages."""
        mask = self.mask()
        return attend_pages(self.inputs(), self.numbers(), block_mask=mask), mask


def case(
    shape: tuple[int, int, int, int],
    heads: tuple[int, int],
    ends: list[int],
    prompts: list[int],
    rule: BlockRule,
    dtype: torch.dtype = torch.bfloat16,
    **more: Any,
) -> Case:
    """`shape` is B, S, T, D; `heads` are G and how many query heads share one. NaN past an end."""
    B, S, T, D = shape
    G, group = heads
    random = torch.Generator("cuda").manual_seed(S + T)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device="cuda", generator=random).to(dtype)

    q = 3 * normal(B, S, G * group, D).transpose(1, 2)
    k, v = normal(B, G, T, D), normal(B, G, T, D)
    for b, end in enumerate(ends):
        k[b, :, end:] = v[b, :, end:] = torch.nan
    return Case(q, k, v, ends, prompts, rule, **more)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, D: int) -> Case:
    """Prompts, chunks that begin at a tile's edge and elsewhere, short calls on many keys."""
    B = draw(st.integers(1, 3))
    S = draw(st.sampled_from([16, 40, 128, 130, 500, 896, 1900]))
    past = draw(st.sampled_from([0, 5, 128, 1280, 1400, 5000]))
    ends = [draw(st.one_of(st.just(S + past), st.integers(1, S + past))) for _ in range(B)]
    prompts = [end + draw(st.sampled_from([0, 0, 700, 3000, -200])) for end in ends]
    rule = BlockRule(
        draw(st.sampled_from([0.05, 0.3, 0.8, 0.95])), draw(st.sampled_from([0, 0, 600])),
        draw(st.sampled_from([0, 8, 129])), draw(st.sampled_from([1, 128, 300])),
        draw(st.sampled_from([1, 128])),
    )  # fmt: skip
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 4), (1, 8), (2, 7)]))
    return case(
        (B, S, S + past, D), heads, ends, prompts, rule, dtype,
        size=draw(st.sampled_from(SIZES)), strides=draw(st.sampled_from(LAYOUTS)),
        apart=draw(st.booleans()), softcap=draw(st.sampled_from([0.0, 0.0, 15.0])),
    )  # fmt: skip


def same(one: Case) -> None:
    """Bit for bit, and no NaN came in from slots that hold no key."""
    for found, expected in zip(one.by_pages(), one.in_one_piece(), strict=True):
        assert torch.equal(found, expected), one
        assert found.isfinite().all(), one


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_calls_give_the_bits_of_one_piece(dtype: torch.dtype, D: int) -> None:
    @given(cases(dtype, D))
    @BUDGET
    def check(one: Case) -> None:
        same(one)

    check()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_long_chunks_give_the_bits_of_one_piece(size: int, D: int) -> None:
    """Enough tiles for items of every kind, a batch of two lengths, pages cut by the rows' ends."""
    rule = BlockRule(0.5, 0)
    for S, past, prompt in ((4096, 16384, 30000), (3000, 9001, 12001), (12000, 0, 12000)):
        T = S + past
        same(case((2, S, T, D), (2, 4), [T, T - 777], [prompt, T], rule, size=size))


@pytest.mark.parametrize(("mass", "S"), [(1.0, 700), (1.0, 1), (0.9, 1), (0.9, 15), (1.0, 5000)])
def test_calls_that_are_dense_by_size_keep_every_block(mass: float, S: int) -> None:
    """They run the kernels of key blocks, where keys in one piece go to the dense mode's."""
    ends = [6000, 5123]
    one = case((2, S, 6000, 128), (2, 4), ends, ends, BlockRule(mass, 0), torch.float16)
    found, expected = one.by_pages(), one.in_one_piece()
    assert torch.equal(found[1], expected[1])
    off = (found[0].double() - expected[0].double()).abs().max()
    assert off <= TOLERANCES["float16"] * expected[0].abs().max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_rule(dtype: str, size: int) -> None:
    """Choice and output against the reference."""
    shape, prompt = AttentionShape(4, 2, 64, 64), (2100, 1800)
    call = sparse_call(shape, Rows(384, (0, 0), prompt), 1300, BlockRule(0.8, 0), dtype=dtype)
    q, k, v = (x.cuda() for x in (call.query, call.key, call.value))
    one = Case(q, k, v, [1684] * 2, list(prompt), call.attention.rule, size)
    mask = one.mask()
    numbers = one.numbers() | {"scale": call.attention.scale}
    output = attend_pages(one.inputs(), numbers, block_mask=mask)
    assert 0.2 < mask.sum() / one.mask().bool().tril().sum() < 0.9
    call.check(mask.bool().cpu().numpy(), output.cpu())


def test_the_result_is_written_where_it_is_wanted() -> None:
    one = case((1, 896, 2000, 128), (2, 4), [2000], [4000], BlockRule(0.8, 0))
    rows = torch.full((1000, 8, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    attend_pages(one.inputs(), one.numbers(), rows[None, 50:946])
    assert torch.equal(rows[None, 50:946].transpose(1, 2), one.in_one_piece()[0])
    assert rows[:50].isnan().all()
    assert rows[946:].isnan().all()


def test_a_captured_graph_follows_tables_and_lengths() -> None:
    one = case((2, 700, 3000, 128), (2, 4), [3000, 2100], [5000, 4000], BlockRule(0.8, 0))
    inputs = one.inputs()
    attend_pages(inputs, one.numbers())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_pages(inputs, one.numbers())
    for seed, ends in enumerate(([3000, 2100], [1500, 2000]), start=1):
        other = replace(one, ends=ends).inputs(seed)
        for pool, fresh in (
            (inputs.pages.key, other.pages.key),
            (inputs.pages.value, other.pages.value),
        ):
            pool.copy_(fresh)
        inputs.pages.table.copy_(other.pages.table)
        inputs.seqlens_k.copy_(other.seqlens_k)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, replace(one, ends=ends).in_one_piece()[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "keys by pages are read on Hopper GPUs .* alone"),
        ({"D": 80}, "keys by pages are read on Hopper GPUs .* alone"),
        ({"size": 8}, "take pages of 16, 32, 64 or 128 slots"),
        ({"size": 48}, "take pages of 16, 32, 64 or 128 slots"),
    ],
)
def test_what_the_kernels_do_not_take_is_told(changes: dict[str, Any], message: str) -> None:
    given = {"dtype": torch.float16, "D": 64, "size": 16} | changes
    rule, shape = BlockRule(0.8, 0), (1, 500, 900, given["D"])
    one = case(shape, (1, 2), [900], [900], rule, given["dtype"], size=given["size"])
    with pytest.raises(RuntimeError, match=message):
        one.by_pages()
