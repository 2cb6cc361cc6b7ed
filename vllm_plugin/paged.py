"""Streaming rows over pages: two calls of FlashAttention and the merge of their results.

A streaming row `i >= sink + window` keeps the sinks `[0, sink)` and its window
`[i - window + 1, i]`, and the two do not overlap. One call has the window, over the page table; one
has the sinks, which are the first keys of that table; what they leave is merged by the logarithms
of their sums. Nothing is gathered, and the cost is O(rows * (sink + window)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm.segments import SegmentTensors


@dataclass(frozen=True)
class FlashCalls:
    """vLLM's functions: `attend` is `flash_attn_varlen_func`, `merge` is `merge_attn_states`.

    `settings` are what every call of `attend` gets: scale, softcap, version, number of splits.
    """

    attend: Callable[..., Any]
    merge: Callable[..., None]
    settings: dict[str, Any]


@dataclass(frozen=True)
class PagedKeys:
    """Keys and values of a layer, `[pages, page, G, D]` each."""

    key: Tensor
    value: Tensor


def stream_paged(
    query: Tensor,
    keys: PagedKeys,
    segments: SegmentTensors,
    sinks: Tensor,
    pattern: TrianglePattern,
    calls: FlashCalls,
    output: Tensor,
) -> None:
    """`query [rows, H, D]` of streaming segments, into `output [rows, H, D]`.

    `sinks [n]` int32 says for each segment how many first keys it sees: the pattern's.
    """
    given = {
        "q": query,
        "k": keys.key,
        "v": keys.value,
        "cu_seqlens_q": segments.starts,
        "max_seqlen_q": segments.longest_rows,
        "block_table": segments.table,
        "return_softmax_lse": True,
        **calls.settings,
    }
    near, near_sums = calls.attend(
        **given, seqused_k=segments.keys, max_seqlen_k=segments.longest_keys, causal=True,
        window_size=[pattern.sliding_window_size - 1, 0],
    )  # fmt: skip
    if not pattern.num_sink_tokens:
        output.copy_(near)
        return
    first, first_sums = calls.attend(
        **given, seqused_k=sinks, max_seqlen_k=pattern.num_sink_tokens, causal=False,
        window_size=[-1, -1],
    )  # fmt: skip
    calls.merge(output, first, first_sums, near, near_sums)
