"""The pattern as a plain Triton program, a page long: what the CUDA kernel must be worth its size.

Streaming rows take one pass over sinks and window; the last rows a second launch, split over keys
and added up by torch. Batch 1, no padding, whole prompts, sinks at most 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634


@triton.jit
def _visit(acc, peak, total, q, k_base, v_base, columns, kept, size, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Online softmax over one tile of keys; `kept [rows, columns]`."""
    d = tl.arange(0, D)
    inside = columns[:, None] < size
    k = tl.load(k_base + columns[:, None] * D + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_base + columns[:, None] * D + d[None, :], mask=inside, other=0.0)
    scores = tl.where(kept, tl.dot(q, tl.trans(k)), -1.0e30)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    factor = tl.exp2(peak - new_peak)
    weights = tl.where(kept, tl.exp2(scores - new_peak[:, None]), 0.0)
    total = total * factor + tl.sum(weights, 1)
    acc = acc * factor[:, None] + tl.dot(weights.to(v.dtype), v)
    return acc, new_peak, total


@triton.jit
def _stream(  # type: ignore[no-untyped-def]
    query, key, value, output, size, streaming, sink, window, scale,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, D)
    place = (rows[:, None] * H + head) * D + d[None, :]
    q = tl.load(query + place, mask=rows[:, None] < streaming, other=0.0)
    q = (q * scale).to(q.dtype)
    k_base = key + (head // GROUP).to(tl.int64) * size * D
    v_base = value + (head // GROUP).to(tl.int64) * size * D
    acc = tl.zeros([M, D], tl.float32)
    peak = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    low = tl.maximum(tl.program_id(0) * M - window + 1, 0) // N * N
    first = tl.arange(0, 16)
    sinks = (first[None, :] < sink) & (first[None, :] < low) & (rows[:, None] >= 0)
    acc, peak, total = _visit(acc, peak, total, q, k_base, v_base, first, sinks, size, D)
    for start in range(low, tl.minimum((tl.program_id(0) + 1) * M, size), N):
        columns = start + tl.arange(0, N)
        behind = rows[:, None] - columns[None, :]
        kept = (behind >= 0) & ((behind < window) | (columns[None, :] < sink))
        acc, peak, total = _visit(acc, peak, total, q, k_base, v_base, columns, kept, size, D)
    acc = acc / total[:, None]
    tl.store(output + place, acc.to(output.dtype.element_ty), mask=rows[:, None] < streaming)


@triton.jit
def _tail(  # type: ignore[no-untyped-def]
    query, key, value, sums, weights, size, streaming, share, scale,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    part, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    local = tile * M + tl.arange(0, M)
    rows = streaming + local
    d = tl.arange(0, D)
    place = (rows[:, None] * H + head) * D + d[None, :]
    q = tl.load(query + place, mask=rows[:, None] < size, other=0.0)
    q = (q * scale).to(q.dtype)
    k_base = key + (head // GROUP).to(tl.int64) * size * D
    v_base = value + (head // GROUP).to(tl.int64) * size * D
    acc = tl.zeros([M, D], tl.float32)
    peak = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, size), N):
        columns = start + tl.arange(0, N)
        kept = columns[None, :] <= rows[:, None]
        acc, peak, total = _visit(acc, peak, total, q, k_base, v_base, columns, kept, size, D)
    base = ((part * H + head) * tl.num_programs(2) + tile) * M + tl.arange(0, M)
    tl.store(sums + base[:, None] * D + d[None, :], acc)
    tl.store(weights + base * 2, peak)
    tl.store(weights + base * 2 + 1, total)


def triangle_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: tuple[int, int, int]
) -> torch.Tensor:
    """`query [1, N, H, D]`, `key` and `value [1, G, N, D]` -> `[1, N, H, D]`."""
    sink, window, last = pattern
    _, size, heads, D = query.shape
    group, streaming = heads // key.shape[1], max(0, size - last)
    output = torch.empty_like(query)
    scale = D**-0.5 * _LOG2E
    sizes: dict[str, Any] = {"H": heads, "GROUP": group, "N": 64, "D": D}
    if streaming:
        _stream[(triton.cdiv(streaming, 64), heads)](
            query, key, value, output, size, streaming, sink, window, scale,
            M=64, num_warps=4, num_stages=3, **sizes,
        )  # fmt: skip
    M, share = 64, 2048
    tiles, parts = triton.cdiv(size - streaming, M), triton.cdiv(size, share)
    sums = query.new_empty(parts, heads, tiles * M, D, dtype=torch.float32)
    weights = query.new_empty(parts, heads, tiles * M, 2, dtype=torch.float32)
    _tail[(parts, heads, tiles)](
        query, key, value, sums, weights, size, streaming, share, scale,
        M=M, num_warps=4, num_stages=3, **sizes,
    )  # fmt: skip
    factor = torch.exp2(weights[..., 0] - weights[..., 0].amax(0))
    merged = (sums * factor[..., None]).sum(0) / (weights[..., 1] * factor).sum(0)[..., None]
    output[0, streaming:] = merged[:, : size - streaming].transpose(0, 1).to(output.dtype)
    return output
