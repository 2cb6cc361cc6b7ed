"""The hand-over of keys by pages to the CUDA library, with a library that runs on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.pytorch.cuda_call import Inputs, run_kernels
from trianglemix.pytorch.paged_call import PagedInputs, attend_pages

from tests.pytorch.page_pools import LAYOUTS, Strides, beside, paged
from tests.pytorch.test_cuda_call import _library as _library
from tests.pytorch.test_cuda_call import askew_rows, wide

DENSE = {"sink": 2, "window": 8, "last": 4, "scale": 0.25, "softcap": 0.0}
DENSE |= {"mass": 1.0, "min_length": 0}
ENDS = [30, 17]


def whole(heads: int = 2, batch: int = 2) -> Inputs:
    random = torch.Generator().manual_seed(heads)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random)

    ends, prompts = (torch.tensor([n + x for n in ENDS[:batch]]).int() for x in (-1, 50))
    q = normal(batch, 10, 4, 16).transpose(1, 2)
    k, v = normal(batch, heads, 30, 16), normal(batch, heads, 30, 8)
    return Inputs(q, k, v, ends, prompts, torch.zeros(batch, dtype=torch.int32))


def by_pages(
    inputs: Inputs, size: int = 4, strides: Strides = beside, apart: bool = False
) -> PagedInputs:
    ends = (inputs.seqlens_k + 1).tolist()
    pages = paged(inputs.key, inputs.value, ends, size, strides=strides, apart=apart)
    return PagedInputs(inputs.query, pages, inputs.seqlens_k, inputs.prompt_length, max(ends))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize(("size", "heads", "batch"), [(4, 2, 2), (32, 1, 2), (7, 4, 1), (1, 1, 1)])
def test_pages_give_what_one_piece_gives(
    strides: Strides, size: int, heads: int, batch: int, apart: bool
) -> None:
    inputs = whole(heads, batch)
    expected = run_kernels("block_sparse", inputs, DENSE)
    output = attend_pages(by_pages(inputs, size, strides, apart), DENSE)
    assert torch.equal(output, expected)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, askew_rows, wide])
def test_queries_of_any_layout(layout: Any) -> None:
    inputs = by_pages(whole())
    laid = inputs._replace(query=layout(inputs.query))
    assert torch.equal(attend_pages(laid, DENSE), attend_pages(inputs, DENSE))


def test_dimensions_of_one_have_strides_that_loads_take(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = by_pages(whole(1, 1), 32)
    pages = replace(
        inputs.pages,
        key=inputs.pages.key[:1].as_strided((1, 1, 32, 16), (3, 5, 24, 1)),
        value=inputs.pages.value[:1],
        table=torch.zeros(1, 1, dtype=torch.int32).as_strided((1, 1), (0, 5)),
    )
    seen = list[Any]()

    def look(kernels: Any, address: int, *_: Any) -> None:
        seen.append(kernels.problem.from_address(address).pages)

    monkeypatch.setattr("trianglemix.pytorch.paged_call.launch", look)
    attend_pages(inputs._replace(pages=pages), DENSE)
    strides = seen[0].key
    assert (strides.page, strides.head, strides.slot) == (16, 16, 24)
    assert seen[0].row_pages == 1


def test_the_result_is_written_where_it_is_wanted() -> None:
    inputs = by_pages(whole())
    rows = torch.full((5, 10, 4, 8), torch.nan)
    output = attend_pages(inputs, DENSE, rows[2:4])
    assert torch.equal(rows[2:4].transpose(1, 2), attend_pages(inputs, DENSE))
    assert output.data_ptr() == rows[2:4].data_ptr()
    assert rows[[0, 1, 4]].isnan().all()


def test_rules_and_masks_arrive() -> None:
    rule = DENSE | {"mass": 0.5, "min_length": 600}
    with pytest.raises(RuntimeError, match=r"mass 0\.5 least 600 pattern 2 8 4 mask 1"):
        attend_pages(by_pages(whole()), rule, block_mask=torch.zeros(2, 4, 1, 1, dtype=torch.uint8))


def test_nothing_to_do_gives_zeros() -> None:
    inputs = by_pages(whole())
    for empty in (inputs._replace(total=0), inputs._replace(query=inputs.query[:, :, :0])):
        output = attend_pages(empty, DENSE)
        assert output.shape == (*empty.query.shape[:3], 8)
        assert not output.any()


def changed(inputs: PagedInputs, **pages: Tensor) -> PagedInputs:
    return inputs._replace(pages=replace(inputs.pages, **pages))


TABLE = torch.zeros(2, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({"key": torch.zeros(9, 2, 5, 16)}, r"key \[9, 2, 5, 16\] and value .* but must be \[B, H"),
        ({"value": torch.zeros(9, 2, 4)}, r"value \[9, 2, 4\], but must be \[B, H"),
        (
            {"key": torch.zeros(9, 2, 4, 24), "value": torch.zeros(9, 2, 4, 8)},
            "query has heads of 16 numbers, but keys of 24",
        ),
        (
            {"key": torch.zeros(9, 3, 4, 16), "value": torch.zeros(9, 3, 4, 8)},
            "num_heads 4 must be a positive multiple",
        ),
        (
            {"key": torch.zeros(9, 2, 4, 16).half(), "value": torch.zeros(9, 2, 4, 8)},
            "key torch.float16 and value torch.float32, but must be one of",
        ),
        (
            {"key": torch.zeros(9, 2, 4, 32)[..., ::2], "value": torch.zeros(9, 2, 4, 8)},
            r"key's pages have strides \[256, 128, 32, 2\]",
        ),
        (
            {"key": torch.zeros(9, 2, 4, 16), "value": torch.zeros(9, 2, 4, 9)[..., 1:]},
            "value's pages .* the address a multiple of 16",
        ),
        ({"table": TABLE.long()}, r"table is torch.int64 \[2, 8\], but must be int32 \[2, pages\]"),
        ({"table": TABLE[:1]}, r"table is torch.int32 \[1, 8\], but must be int32 \[2, pages\]"),
        ({"table": TABLE[:, :7]}, "7 pages of 4 slots a row, but 30 keys are read"),
        ({"table": TABLE.T.contiguous().T}, "a row's entries must lie together"),
        ({"table": TABLE.to("meta")}, r"on cpu, but its other .*\['cpu', 'meta'\]"),
    ],
)
def test_pages_that_are_none_are_refused(pages: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        attend_pages(changed(by_pages(whole()), **pages), DENSE)


def test_lengths_and_outputs_that_are_none_are_refused() -> None:
    inputs = by_pages(whole())
    with pytest.raises(ConfigurationError, match=r"seqlens_k is torch.int64 \[2\]"):
        attend_pages(inputs._replace(seqlens_k=inputs.seqlens_k.long()), DENSE)
    for output in (
        torch.zeros(2, 4, 10, 8),
        torch.zeros(2, 10, 4, 8).half(),
        torch.zeros(2, 10, 8, 8)[:, :, ::2],
        torch.zeros(2 * 10 * 4 * 8 + 1)[1:].view(2, 10, 4, 8),
    ):
        with pytest.raises(ConfigurationError, match=r"output is .* contiguous torch.float32 \[2"):
            attend_pages(inputs, DENSE, output)
