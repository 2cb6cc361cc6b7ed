"""Block-sparse attention of the CUDA library to keys and values that lie by pages, as vLLM's do.

On Hopper GPUs alone, in float16 and bfloat16, with head sizes 64, 96, 128 and 256 and pages of 16,
32, 64 or 128 slots. Nothing is gathered: the kernels read the pages where they are.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trianglemix.custom_ops import cuda_library
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.cuda_library import BLOCK_SPARSE, PageStrides, load_kernels
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.pytorch.cuda_call import (
    ALIGNMENT,
    DTYPES,
    aligned,
    check_devices,
    check_lengths,
    launch,
    mask_address,
)


@dataclass(frozen=True)
class KeyPages:
    """Pools `key [pages, G, size, D]` and `value [pages, G, size, Dv]`, and whose pages are whose.

    Both are views of any strides whose last is 1. `table [B, n]` is int32 on the same device: token
    t of row b is slot `t % size` of page `table[b, t // size]`. Entries behind a row's last key are
    not read.
    """

    key: Tensor
    value: Tensor
    table: Tensor


class PagedInputs(NamedTuple):
    """`query [B, H, S, D]`, the pages, and int32 `[B]` on the same device: the end of the row's
    keys minus one, and the prompt's length. `total` is at least the largest end.
    """

    query: Tensor
    pages: KeyPages
    seqlens_k: Tensor
    prompt_length: Tensor
    total: int


def attend_pages(
    inputs: PagedInputs,
    numbers: dict[str, float],
    output: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> Tensor:
    """Enqueues one call on the current stream: `[B, H, S, Dv]`, which lies as `[B, S, H, Dv]`.

    `numbers` are as in `run_kernels`, of "block_sparse". The result is written to `output`, where
    there is one: contiguous `[B, S, H, Dv]`. Queries are read where they are if they lie as
    `[B, S, H, D]`; else they are copied. `block_mask` is uint8 `[B, H, C, C]`,
    `C = ceil(total / 128)`.

    Raises:
        ConfigurationError: tensors that are no such call.
        LibraryNotFoundError: there is no CUDA library.
        RuntimeError: what the kernels do not take, or CUDA's own error.
    """
    query, pages = inputs.query, inputs.pages
    check_paged(inputs, output)
    B, H, S, D = query.shape
    Dv = pages.value.shape[3]
    if output is None:
        output = query.new_empty(B, S, H, Dv)
    if inputs.total == 0 or S == 0 or B == 0:
        return output.zero_().transpose(1, 2)
    rows = aligned(query.transpose(1, 2))
    kernels = load_kernels(*BLOCK_SPARSE)
    problem: Any = kernels.problem(dtype=DTYPES[query.dtype], **numbers)
    problem.batch, problem.query_length, problem.num_heads = B, S, H
    problem.kv_num_heads, problem.head_size, problem.value_head_size = pages.key.shape[1], D, Dv
    problem.past_capacity = problem.present_capacity = problem.total = inputs.total
    problem.query_stride = H * D
    problem.query, problem.output = rows.data_ptr(), output.data_ptr()
    problem.present_key, problem.present_value = pages.key.data_ptr(), pages.value.data_ptr()
    problem.seqlens_k = inputs.seqlens_k.data_ptr()
    problem.prompt_length = inputs.prompt_length.data_ptr()
    problem.pages = _structure(pages)
    problem.block_mask = mask_address(block_mask, query, inputs.total)
    address = ctypes.addressof(problem)
    on_cuda = query.device.type == "cuda"
    with torch.cuda.device(query.device) if on_cuda else nullcontext():
        launch(kernels, address, kernels.workspace_bytes(address), query)
    return output.transpose(1, 2)


def _structure(pages: KeyPages) -> cuda_library.KeyPages:
    table, key = pages.table, pages.key
    return cuda_library.KeyPages(
        table.data_ptr(),
        table.stride(0) if table.shape[0] > 1 else table.shape[1],
        key.shape[2],
        key.shape[0],
        _strides(key),
        _strides(pages.value),
    )


def _strides(x: Tensor) -> PageStrides:
    """Torch lets a dimension of size 1 have any stride, the copy engine does not."""
    pairs = zip(x.stride()[:3], x.shape[:3], strict=True)
    return PageStrides(*(stride if size > 1 else x.shape[3] for stride, size in pairs))


def check_paged(inputs: PagedInputs, output: Tensor | None) -> None:
    """Raises ConfigurationError for tensors that are no call of `attend_pages`."""
    query, pages = inputs.query, inputs.pages
    key, value, table = pages.key, pages.value, pages.table
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        raise ConfigurationError(
            f"query is {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}, "
            "but must be [B, H, S, D], [pages, G, size, D] and [pages, G, size, Dv]"
        )
    B, H, S, D = query.shape
    if key.shape[3] != D:
        raise ConfigurationError(f"query has heads of {D} numbers, but keys of {key.shape[3]}")
    AttentionShape(H, key.shape[1], D, value.shape[3])
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ConfigurationError(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}, but must be one of "
            "float32, float16, bfloat16, and the same"
        )
    for name, x in (("key", key), ("value", value)):
        if x.stride(3) != 1 or x.data_ptr() % ALIGNMENT:
            raise ConfigurationError(
                f"{name}'s pages have strides {list(x.stride())} at address {x.data_ptr():#x}, but "
                f"the last stride must be 1 and the address a multiple of {ALIGNMENT}"
            )
    check_table(table, B, inputs.total, key.shape[2])
    lengths = {"seqlens_k": inputs.seqlens_k, "prompt_length": inputs.prompt_length}
    check_lengths(lengths, B)
    if output is not None and (
        output.shape != (B, S, H, value.shape[3])
        or output.dtype != query.dtype
        or not output.is_contiguous()
        or output.data_ptr() % ALIGNMENT
    ):
        raise ConfigurationError(
            f"output is {output.dtype} {list(output.shape)}, but must be contiguous {query.dtype} "
            f"[{B}, {S}, {H}, {value.shape[3]}] at an address that is a multiple of {ALIGNMENT}"
        )
    others = (key, value, table, *lengths.values())
    check_devices(query, *others, *(() if output is None else (output,)))


def check_table(table: Tensor, batch: int, total: int, size: int) -> None:
    """Raises ConfigurationError for a table that has no entry for each of `total` slots a row."""
    if table.dtype != torch.int32 or table.ndim != 2 or table.shape[0] != batch:
        raise ConfigurationError(
            f"table is {table.dtype} {list(table.shape)}, but must be int32 [{batch}, pages]"
        )
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ConfigurationError(
            f"table has strides {list(table.stride())}, but a row's entries must lie together"
        )
    if table.shape[1] * size < total:
        raise ConfigurationError(
            f"table has {table.shape[1]} pages of {size} slots a row, but {total} keys are read"
        )
