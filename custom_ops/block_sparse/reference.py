"""The operator in float64 NumPy: obviously right, slow, and what every kernel is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.rule import (
    Rows,
    block_sums,
    kept_blocks,
    undecided_blocks,
)
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import (
    Call,
    masked_attention,
    probabilities,
    rows_and_present,
    start_position,
)


@dataclass(frozen=True)
class BlockSparse:
    """The attributes of the operator. `scale` 0 means `1/sqrt(D)`, `softcap` 0 means none."""

    shape: AttentionShape
    rule: BlockRule = field(default_factory=BlockRule)
    scale: float = 0.0
    softcap: float = 0.0
    rotary_interleaved: bool = False


def block_sparse_attention(
    call: Call, attention: BlockSparse, block_mask: BoolArray | None = None
) -> tuple[Array, Array, Array, BoolArray]:
    """Returns `output [B, S, H*Dv]` in float64, the present, and `block_mask [B, H, C, C]`.

    `C = ceil(T/128)`. A given `block_mask` (a kernel's own choice) is attended over as it is. What
    keeps no key is zero, and dead slots never reach the output, as in `triangle_attention`.
    """
    if block_mask is None:
        block_mask = choose_blocks(call, attention)
    chosen = block_mask

    def row_mask(b: int) -> BoolArray:
        return _row_mask(rows_of(call, b), call.query.shape[1], chosen[b])

    return (*masked_attention(call, attention, row_mask), chosen)


def rows_of(call: Call, b: int) -> Rows:
    """The slots of a batch row."""
    end = int(call.seqlens_k[b]) + 1
    return Rows(
        first_valid=0 if call.first_valid is None else int(call.first_valid[b]),
        start=start_position(end, call.query.shape[1]),
        end=end,
        prompt_length=end if call.prompt_length is None else int(call.prompt_length[b]),
    )


def choose_blocks(call: Call, attention: BlockSparse) -> BoolArray:
    """`block_mask [B, H, C, C]` (tile, block) by the rule, each head for itself."""
    batch, heads = call.query.shape[0], attention.shape.num_heads
    slots = max(call.past_key.shape[2], call.total_sequence_length)
    most = -(-slots // TILE)
    mask = np.zeros((batch, heads, most, most), bool)
    queries, keys, _ = rows_and_present(call, attention)
    group = heads // attention.shape.kv_num_heads
    for b in range(batch):
        rows = rows_of(call, b)
        for tile in filter(rows.has_rows, range(rows.num_tiles)):
            for h in range(heads):
                if rows.is_dense(tile, attention.rule):
                    mask[b, h, tile, : tile + 1] = True
                    continue
                sums = tile_sums(queries[b, :, h], keys[b, h // group], rows, tile, attention)
                mask[b, h, tile, : tile + 1] = kept_blocks(sums, tile, attention.rule)
    return mask


def misplaced_blocks(
    call: Call, attention: BlockSparse, chosen: BoolArray, band: float
) -> list[tuple[int, int, int]]:
    """Row, head and tile of each choice `[B, H, C, C]` that is not the rule's within the tie band.

    A choice may differ where rounding decides (`rule.undecided_blocks`), and must hold the mass.
    """
    right = choose_blocks(call, attention)
    queries, keys, _ = rows_and_present(call, attention)
    group = attention.shape.num_heads // attention.shape.kv_num_heads
    wrong = []
    for b, h, tile in sorted({(b, h, t) for b, h, t, _ in np.argwhere(chosen != right).tolist()}):
        rows = rows_of(call, b)
        differ = chosen[b, h, tile] != right[b, h, tile]
        if not rows.has_rows(tile) or rows.is_dense(tile, attention.rule):
            wrong.append((b, h, tile))
            continue
        sums = tile_sums(queries[b, :, h], keys[b, h // group], rows, tile, attention)
        open_ = undecided_blocks(sums, tile, attention.rule, band)
        held = sums[chosen[b, h, tile, : tile + 1]].sum()
        decided = differ[tile + 1 :].any() or differ[: tile + 1][~open_].any()
        if decided or held < (attention.rule.mass - band) * sums.sum():
            wrong.append((b, h, tile))
    return wrong


def tile_sums(queries: Array, keys: Array, rows: Rows, tile: int, attention: BlockSparse) -> Array:
    """`[tile + 1]` block sums of a tile, of one head's `queries [S, D]` and `keys [T, D]`."""
    sampled = rows.sampled(tile)
    slots = np.arange(rows.end)
    causal = (slots <= sampled[:, None]) & (slots >= rows.first_valid)
    shares = probabilities(queries[sampled - rows.start], keys[: rows.end], causal, attention)
    return block_sums(shares[:, : rows.first_slot(tile + 1)], rows.first_valid, tile + 1)


def _row_mask(rows: Rows, length: int, kept: BoolArray) -> BoolArray:
    """`[H, S, L]`: which keys each of the `S` new rows keeps, by the blocks of its tile."""
    slots, new = np.arange(rows.end), rows.start + np.arange(length)[:, None]
    exists = (slots >= rows.first_valid) & (slots <= new) & (new < rows.end)
    tile, block = (np.clip(x - rows.first_valid, 0, None) // TILE for x in (new, slots))
    mask: BoolArray = kept[:, np.minimum(tile, kept.shape[1] - 1), block[None, :]] & exists
    return mask
