"""Layers of a patched model on CUDA: the library's kernels where they take the call and gain by it.

They do for float16 and bfloat16 on GPUs from compute capability 8.0 on, whatever the lengths:
prompts, chunks, padded batches, decode steps. What is left runs compiled flex_attention.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor
from trianglemix.custom_ops.contract import HEAD_SIZE_STEP, MAX_HEAD_SIZE
from trianglemix.custom_ops.cuda_library import BLOCK_SPARSE, TRIANGLE, load_kernels
from trianglemix.custom_ops.library import LibraryNotFoundError
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.cuda_call import current_stream, is_capturing
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.operators import attend_blocks, attend_triangle

logger = logging.getLogger(__name__)

LEAST_CAPABILITY: Final = (8, 0)
HOPPER: Final = (9, 0)
HOPPER_HEAD_SIZES: Final = (64, 96, 128, 256)
LEAST_DENSE_PAIRS: Final = 2**29
_MOST_TOKENS: Final = 2**29 - 1
_MOST_ROWS: Final = 65535
_MOST_HEAD_BYTES: Final = 2**32 - 1
_LONGEST: Final = 2**31 - 1


def why_not_kernels(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a call does not run the library's kernels; None where it does.

    `query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]`.
    """
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}, but the kernels are for CUDA"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries are {query.dtype}, keys {key.dtype} and values {value.dtype}"
    why = why_not_heads(query.dtype, query.shape[3], value.shape[3])
    if why is not None:
        return why
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "a gradient is wanted, which the kernels have not; call the model under no_grad()"
    return _too_large(query, key, value) or why_not_device(query.device.index or 0)


def why_not_heads(dtype: torch.dtype, *sizes: int) -> str | None:
    """Why heads of that type and of `sizes` numbers do not run the library's kernels, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {dtype}, but the fast kernels are for float16 and bfloat16"
    for size in sizes:
        if size % HEAD_SIZE_STEP or not HEAD_SIZE_STEP <= size <= MAX_HEAD_SIZE:
            return (
                f"a head has {size} numbers, but the kernels take multiples of {HEAD_SIZE_STEP} up "
                f"to {MAX_HEAD_SIZE}"
            )
    return None


def beats_sdpa(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a prompt of which nothing is dropped is faster here than by torch's SDPA.

    Measured on an H100, in the dense mode of Hopper's own kernel (docs/experiments.md). Calls of
    fewer pairs of query and key than `LEAST_DENSE_PAIRS`, over batch and heads, keep the GPU for
    less time than the host takes for a call, and SDPA is called in less.
    """
    B, H, S, _ = query.shape
    if query.device.type != "cuda" or B * H * S * S < LEAST_DENSE_PAIRS:
        return False
    own_kernel = query.shape[3] == value.shape[3] and query.shape[3] in HOPPER_HEAD_SIZES
    return (
        own_kernel and is_hopper(query.device.index or 0) and not why_not_kernels(query, key, value)
    )


def _too_large(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    B, T = query.shape[0], key.shape[2]
    if B > _MOST_ROWS or T > _MOST_TOKENS:
        return f"{B} rows of {T} keys, but the kernels take {_MOST_ROWS} of {_MOST_TOKENS}"
    size = max(query.shape[3], value.shape[3]) * query.element_size() * T
    if size > _MOST_HEAD_BYTES:
        return f"a head's keys or values are {size} bytes, but the kernels take less than 4 GiB"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_device(index: int) -> str | None:
    """Why the library does not run on CUDA device `index`; None where it does. Looked up once."""
    return _why_not_device(index)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_hopper(index: int) -> bool:
    """Whether CUDA device `index` is one that Hopper's own kernels run on."""
    return torch.cuda.get_device_capability(index) == HOPPER


@lru_cache(maxsize=64)
def _why_not_device(index: int) -> str | None:
    why = _find_reason(index)
    if why is not None:
        logger.info("CUDA device %d runs compiled flex_attention: %s", index, why)
    return why


def _find_reason(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return (
            f"the GPU has compute capability {'.'.join(map(str, capability))}, but the kernels "
            f"need {'.'.join(map(str, LEAST_CAPABILITY))}"
        )
    try:
        for entry in (TRIANGLE, BLOCK_SPARSE):
            load_kernels(*entry)
    except LibraryNotFoundError as error:
        return str(error)
    return None


def kernel_triangle(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention
) -> Tensor:
    """`backends.Backend`, by the operator of `torch.ops.trianglemix`."""
    lengths = device_lengths(rows, query.shape[2], query.device)
    pattern = attention.pattern
    result: Tensor = attend_triangle(
        query,
        key,
        value,
        *lengths,
        pattern.num_sink_tokens,
        pattern.sliding_window_size,
        pattern.num_last_tokens,
        attention.scale,
        attention.softcap,
    )
    return result


def kernel_blocks(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: BlockSparse
) -> Tensor:
    """A block-sparse layer, choice of blocks included; shapes as `backends.Backend`."""
    lengths = device_lengths(rows, query.shape[2], query.device)
    rule = attention.rule
    result: Tensor = attend_blocks(
        query,
        key,
        value,
        *lengths,
        rule.num_sink_tokens,
        rule.sliding_window_size,
        rule.num_last_tokens,
        attention.scale,
        attention.softcap,
        rule.mass,
        rule.min_length,
    )
    return result


def device_lengths(rows: Rows, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The operators' three lengths of a call of `length` new tokens; nothing waits for the device.

    Layers of one call share them. A captured graph gets its own: what is made while it is captured
    holds nothing outside of it, and what was made before may be gone when it runs.
    """
    end = rows.start + length
    numbers = ((end - 1,) * len(rows.first_valid), rows.prompt_length, rows.first_valid)
    if torch.compiler.is_compiling() or device.type != "cuda":
        made = [_made(values, device) for values in numbers]
    else:
        stream = current_stream(device.index)
        make = _made if is_capturing() else _shared
        made = [make(values, device, stream) for values in numbers]
    return made[0], made[1], made[2]


def _made(values: tuple[int, ...], device: torch.device, stream: int = 0) -> Tensor:
    """By fills, which no copy from the host holds up: one where all rows of the batch agree."""
    bounded = [max(-_LONGEST, min(value, _LONGEST)) for value in values]
    made = torch.full(
        (len(values),), bounded[0] if bounded else 0, dtype=torch.int32, device=device
    )
    for b, value in enumerate(bounded):
        if value != bounded[0]:
            made[b : b + 1].fill_(value)
    return made


_shared = lru_cache(maxsize=16)(_made)
"""For each stream its own: another may run before the fills."""
