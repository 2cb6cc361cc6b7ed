"""Queries and keys with the structure of real heads, and what a choice of keys keeps of them.

Unit-normal tensors have no structure that a rule could find. Each head here divides its attention
into shares, drawn at random by head: sinks (the first 4 keys), columns (16 keys anywhere, the same
for the heads of a group), slashes (three distances), a local band, and noise over all keys. A
share becomes a logit that would give it at the last row, beside unit-normal noise:
`ln(share / share of the noise) + ln(S) + 1/2`, less `ln(number of keys)` where it is for several.
Slashes and band are inner products of waves, as a rotary embedding makes them: the key at j holds
the cosines and sines of j, the query at i those of i less the distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

SINKS: Final = 4
COLUMNS: Final = 16
SLASHES: Final = 3
SHARP: Final = 24  # pairs of channels with waves of any length: their sum has one narrow peak
BROAD: Final = 8  # pairs with waves of 50 to 6,000 tokens: a band of some hundred
USED: Final = 2 * (SHARP + BROAD) + 2  # channels; the others are noise
NOISE_SHARE: Final = 0.15

Keeps = Callable[[int, torch.Tensor], torch.Tensor]  # (head, rows [R]) -> kept keys, bool [R, S]


def waves(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines and sines `[S, 2 F]`; two such vectors multiply to the sum of cosines between."""
    angles = positions.double()[:, None] * frequencies.double()
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def structured_heads(
    tokens: int, heads: int = 32, groups: int = 8, size: int = 128, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query `[1, S, H, D]`, key and value `[1, S, G, D]`, bfloat16, the same ones at every call."""
    draw = torch.Generator().manual_seed(1)
    sharp = torch.rand(SHARP, generator=draw) * math.pi
    broad = torch.logspace(math.log10(1 / 8), -3, BROAD)
    places = torch.arange(tokens)
    torch.manual_seed(2)
    key = torch.randn(tokens, groups, size, device=device)
    value = torch.randn(1, tokens, groups, size, device=device).bfloat16()
    query = torch.randn(tokens, heads, size, device=device) * math.sqrt(size / (size - USED))
    code = torch.cat([waves(places, sharp), waves(places, broad)], -1).to(device)
    key[..., : USED - 2] = code[:, None]
    key[..., USED - 2 : USED] = 0
    key[:SINKS, :, USED - 2] = 1
    for group in range(groups):
        columns = torch.randint(SINKS, tokens, (COLUMNS,), generator=draw)
        key[columns.to(device), group, USED - 1] = 1
    for head in range(heads):
        query[:, head, :USED] = _asked(tokens, sharp, broad, draw).to(device) * math.sqrt(size)
    return query[None].bfloat16(), key[None].bfloat16(), value


def distances(tokens: int, draw: torch.Generator) -> list[int]:
    """Of a head's slashes: from 16 tokens to half of the prompt, evenly on a log scale."""
    spread = torch.rand(SLASHES, generator=draw).double()
    return [int(16 * (tokens / 32) ** float(x)) for x in spread]


def _asked(
    tokens: int, sharp: torch.Tensor, broad: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """The structured channels `[S, USED]` of one head's queries, before `sqrt(D)`."""
    away = distances(tokens, draw)
    shares = torch.rand(4, generator=draw) + 0.1
    sink, column, slash, band = (shares / shares.sum() * (1 - NOISE_SHARE)).tolist()

    def logit(share: float, keys: int) -> float:
        return math.log(share / NOISE_SHARE / keys) + math.log(tokens) + 0.5

    places = torch.arange(tokens)
    slashes = sum(waves(places - d, sharp) * logit(slash, SLASHES) / SHARP for d in away)
    assert isinstance(slashes, torch.Tensor)
    local = waves(places, broad) * logit(band, 64) / BROAD
    fixed = torch.tensor([logit(sink, SINKS), logit(column, COLUMNS)]).expand(tokens, 2)
    return torch.cat([slashes, local, fixed], -1)


def some_rows(tokens: int, count: int = 64, last: int = 128) -> torch.Tensor:
    """Rows `[count]` to look at, in order, none of the `last` ones, which all rules keep dense."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(tokens // 4, tokens - last, (count,), generator=draw).sort().values


def kept_on_rows(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    keeps: Keeps,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept share of the true attention `[H, R]`, and attention over the kept keys `[H, R, D]`.

    `heads` are query `[1, S, H, D]`, key and value `[1, S, G, D]`; the sums are float32. Without
    `causal` the output has all kept keys, of later tokens too; the share never counts those.
    """
    query, key, value = (x[0] for x in heads)
    group = query.shape[1] // key.shape[1]
    rows = rows.to(query.device)
    before = torch.arange(key.shape[0], device=query.device)[None] <= rows[:, None]
    shares, outputs = [], []
    for head in range(query.shape[1]):
        k, v = key[:, head // group].float(), value[:, head // group].float()
        scores = query[rows, head].float() @ k.T / math.sqrt(query.shape[-1])
        kept = keeps(head, rows)
        true = scores.masked_fill(~before, -math.inf).softmax(-1)
        shares.append((true * (kept & before)).sum(-1))
        allowed = kept & before if causal else kept
        outputs.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v)
    return torch.stack(shares), torch.stack(outputs)


def recall_figures(shares: torch.Tensor) -> dict[str, float]:
    """Of kept shares `[H, R]`: the mean, the 5th percentile and the worst head's mean."""
    return {
        "recall": float(shares.mean()),
        "recall_5th_percentile": float(shares.flatten().quantile(0.05)),
        "recall_worst_head": float(shares.mean(1).min()),
    }
