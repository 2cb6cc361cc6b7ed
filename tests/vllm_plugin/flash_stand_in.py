"""FlashAttention's calls in plain PyTorch, in float64, and random steps over pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse, tile_sums
from trianglemix.custom_ops.block_sparse.rule import Rows, kept_blocks
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep_mask
from trianglemix.pytorch.cuda_call import NUMBERS
from trianglemix.pytorch.operators import attend_blocks
from trianglemix.pytorch.paged_call import PagedInputs
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.row_split import Request

H: Final = 4
G: Final = 2
D: Final = 16
PAGE: Final = 16
SCALE: Final = D**-0.5
BAND: Final = 1e-5
"""How far from `mass` a sum must stay, so that float32 and float64 choose alike."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
    seqused_k: Tensor, softmax_scale: float, causal: bool, window_size: Sequence[int] | None,
    block_table: Tensor, return_softmax_lse: bool = False, out: Tensor | None = None,
    **ignored: Any,
) -> Any:  # fmt: skip
    """`flash_attn_varlen_func` over pages `[pages, page, G, D]`: masks from the bottom right."""
    starts, outputs, sums = cu_seqlens_q.tolist(), [], []
    assert max_seqlen_q >= max(b - a for a, b in pairwise(starts))
    assert max_seqlen_k >= int(seqused_k.max())
    for r, (begin, end) in enumerate(pairwise(starts)):
        j = torch.arange(int(seqused_k[r]))
        page = block_table[r, j // PAGE].long()
        i = (torch.arange(end - begin) + len(j) - (end - begin))[:, None]
        mask = (j <= i) if causal else torch.ones(end - begin, len(j), dtype=torch.bool)
        if window_size is not None and window_size[0] >= 0:
            mask = mask & (j >= i - window_size[0])
        result = _attend(q[begin:end], k[page, j % PAGE], v[page, j % PAGE], mask, softmax_scale)
        outputs.append(result[0])
        sums.append(result[1])
    output, lse = torch.cat(outputs).to(q.dtype), torch.cat(sums, 1).float()
    if out is not None:
        output = out.copy_(output)
    return (output, lse) if return_softmax_lse else output


def merge(output: Tensor, one: Tensor, one_sums: Tensor, other: Tensor, other_sums: Tensor) -> None:
    """`merge_attn_states`: `[rows, H, D]` with `[H, rows]`."""
    share = torch.sigmoid(one_sums - other_sums).T[..., None]
    output.copy_(one * share + other * (1 - share))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (x.double().repeat_interleave(H // G, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def attend_pages(inputs: PagedInputs, numbers: dict[str, float], output: Tensor) -> None:
    """`paged_call.attend_pages` of one row, by `torch.ops` on keys that are gathered."""
    (table,), T = inputs.pages.table, inputs.total
    assert inputs.seqlens_k.tolist() == [T - 1]
    j = torch.arange(T)
    page = table[j // PAGE].long()
    keys = [
        x[page, :, j % PAGE].transpose(0, 1)[None] for x in (inputs.pages.key, inputs.pages.value)
    ]
    first = torch.zeros(1, dtype=torch.int32)
    lengths = inputs.seqlens_k, inputs.prompt_length, first
    given = [numbers[name] for name in NUMBERS]
    output.copy_(attend_blocks(inputs.query, *keys, *lengths, *given).transpose(1, 2))


@dataclass(frozen=True)
class Batch:
    """A step over pages: what vLLM hands to a layer, the right answers of its role and of none."""

    query: Tensor
    cache: Tensor
    table: Tensor
    expected: Tensor
    dense: Tensor


def random_batch(requests: Sequence[Request], keeps: Keeps, seed: int) -> Batch:
    """Pages `[pages, G, page, 2 D]` (heads inside pages, as vLLM sees them), shuffled; float32.

    Slots that hold no token are NaN, so that a key too many cannot pass unseen.
    """
    torch.manual_seed(seed)
    wide = max((-(-request.tokens // PAGE) for request in requests), default=0) + 1
    table = torch.randperm(wide * len(requests)).view(-1, wide).int()
    memory = torch.full((max(1, table.numel()), PAGE, G, 2 * D), float("nan"))
    queries, answers, plain = [torch.empty(0, H, D)], [torch.empty(0, H, D)], []
    for r, request in enumerate(requests):
        T, rows = request.tokens, request.end - request.begin
        both, position = torch.randn(T, G, 2 * D), torch.arange(T)
        memory[table[r, position // PAGE].long(), position % PAGE] = both
        causal = position <= position[T - rows :, None]
        if isinstance(keeps, BlockRule):
            q, kept = _kept_blocks(request, both[..., :D], causal, keeps)
        else:
            q, kept = torch.randn(rows, H, D), _kept(request, keeps)[T - rows :]
        for mask, found in ((kept, answers), (causal, plain)):
            found.append(_attend(q, both[..., :D], both[..., D:], mask, SCALE)[0])
        queries.append(q)
    return Batch(
        torch.cat(queries), memory.transpose(1, 2), table, torch.cat(answers),
        torch.cat(plain) if plain else torch.empty(0, H, D),
    )  # fmt: skip


def _kept(request: Request, pattern: TrianglePattern) -> Tensor:
    """`[T, T]`: the predicate's mask; rows after the prompt are dense."""
    T, N = request.tokens, request.prompt_length
    if T <= N:
        return torch.from_numpy(keep_mask(N, pattern))[:T, :T]
    kept = torch.ones(T, T, dtype=torch.bool).tril()
    kept[:N, :N] = torch.from_numpy(keep_mask(N, pattern))
    return kept


def _kept_blocks(
    request: Request, key: Tensor, causal: Tensor, rule: BlockRule
) -> tuple[Tensor, Tensor]:
    """Queries `[rows, H, D]` whose blocks no rounding decides, and what each head keeps of them,
    `[H, rows, T]`: by the reference, over the keys `[T, G, D]`."""
    rows = Rows(0, request.tokens - len(causal), request.tokens, request.prompt_length)
    attention = BlockSparse(AttentionShape(H, G, D, D), rule, SCALE)
    while True:
        query, kept, open_ = torch.randn(len(causal), H, D), causal.repeat(H, 1, 1), False
        for tile in filter(rows.has_rows, range(rows.num_tiles)):
            if rows.is_dense(tile, rule):
                continue
            at = slice(TILE * tile - rows.start, TILE * (tile + 1) - rows.start)
            for h in range(H):
                k = key[:, h // (H // G)].double().numpy()
                sums = tile_sums(query[:, h].double().numpy(), k, rows, tile, attention)
                less, more = (
                    kept_blocks(sums, tile, replace(rule, mass=rule.mass + band))
                    for band in (-BAND, BAND)
                )
                open_ |= not np.array_equal(less, more)
                blocks = torch.from_numpy(more)
                kept[h, at, : TILE * (tile + 1)] &= blocks.repeat_interleave(TILE)[: key.shape[0]]
        if not open_:
            return query, kept
