"""T1: what the comparison with other people's kernels gives them, and how it judges them."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule  # noqa: E402
from trianglemix.custom_ops.block_sparse.rule import Rows, kept_blocks  # noqa: E402

from benchmarks import block_sparse_peers, structured_heads, vertical_slash  # noqa: E402
from benchmarks.masked_peers import Masked, bsr, flex_mask, halved, listed  # noqa: E402

TOKENS, HEADS, GROUPS, SIZE = 1024, 4, 2, 128
BLOCKS = TOKENS // TILE


@pytest.fixture(scope="module")
def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query `[1, S, H, D]`, key and value `[1, S, G, D]`."""
    return structured_heads.structured_heads(TOKENS, HEADS, GROUPS, SIZE, "cpu")


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    """Half of the blocks below the diagonal, and those on it, by head `[H, C, C]`."""
    torch.manual_seed(0)
    some = torch.rand(HEADS, BLOCKS, BLOCKS) < 0.5
    return (some | torch.eye(BLOCKS, dtype=torch.bool)).tril()


@pytest.fixture(scope="module")
def given(heads: tuple[torch.Tensor, ...], mask: torch.Tensor) -> Masked:
    """The heads in float32 as the peers are given them."""
    return Masked(*(x.transpose(1, 2).float().contiguous() for x in heads), mask)


def true_mass(heads: tuple[torch.Tensor, ...], head: int, row: int) -> torch.Tensor:
    query, key = (x[0].double() for x in heads[:2])
    scores = key[: row + 1, head // (HEADS // GROUPS)] @ query[row, head] / math.sqrt(SIZE)
    return scores.softmax(-1)


def test_heads_look_at_sinks_slashes_and_band(heads: tuple[torch.Tensor, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    torch.rand(structured_heads.SHARP, generator=draw)
    for _ in range(GROUPS):
        torch.randint(structured_heads.SINKS, TOKENS, (structured_heads.COLUMNS,), generator=draw)
    row = TOKENS - 1
    for head in range(HEADS):
        away = structured_heads.distances(TOKENS, draw)
        torch.rand(4, generator=draw)
        found = true_mass(heads, head, row)
        usual = float(found.median())
        assert found[: structured_heads.SINKS].min() > 5 * usual
        assert min(float(found[row - d]) for d in away) > 5 * usual
        near = [d for d in range(100) if d not in away]
        assert float(found[[row - d for d in near]].mean()) > 1.5 * usual


def test_sampled_rows_keep_more_than_random_blocks(heads: tuple[torch.Tensor, ...]) -> None:
    rule = BlockRule(mass=0.7, min_length=0, num_last_tokens=1)
    rows = Rows(0, 0, TOKENS, TOKENS)
    chosen = torch.zeros(HEADS, BLOCKS, BLOCKS, dtype=torch.bool)
    for head in range(HEADS):
        for tile in range(BLOCKS):
            sums = torch.zeros(BLOCKS * TILE, dtype=torch.float64)
            for row in rows.sampled(tile).tolist():
                sums[: row + 1] += true_mass(heads, head, row)
            blocks = sums.view(BLOCKS, TILE).sum(1)[: tile + 1].numpy()
            chosen[head, tile, : tile + 1] = torch.from_numpy(kept_blocks(blocks, tile, rule))
    picked = structured_heads.some_rows(TOKENS)
    torch.manual_seed(0)
    order = torch.rand(HEADS, BLOCKS, BLOCKS).masked_fill(~chosen.new_ones(chosen.shape).tril(), -1)
    ranks = order.argsort(-1, descending=True).argsort(-1)
    random = (ranks < chosen.sum(-1, keepdim=True)) & (order >= 0)
    assert torch.equal(random.sum(-1), chosen.sum(-1))
    by_rule, by_chance = (
        structured_heads.kept_on_rows(
            heads, picked, Masked(*(x.transpose(1, 2) for x in heads), some).keeps()
        )[0]
        for some in (chosen, random)
    )
    assert by_rule.mean() > 0.7
    assert by_rule.mean() > by_chance.mean() + 0.05


def test_flex_mask_is_ours(mask: torch.Tensor) -> None:
    """Block by block: uncompiled, flex_attention reads `mask_mod` alone and no blocks."""
    blocks = flex_mask(mask)
    assert blocks.shape == (1, HEADS, TOKENS, TOKENS)
    assert torch.equal(blocks.to_dense()[0].bool(), mask)
    whole = torch.zeros_like(mask)
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_indices is not None
    for head, row in torch.cartesian_prod(torch.arange(HEADS), torch.arange(BLOCKS)).tolist():
        count = int(blocks.full_kv_num_blocks[0, head, row])
        whole[head, row, blocks.full_kv_indices[0, head, row, :count].long()] = True
    assert torch.equal(whole, mask.tril(-1))
    at = torch.arange(300)
    causal = blocks.mask_mod(at[:0], at[:0], at[:, None], at[None])
    assert torch.equal(causal, torch.ones(300, 300, dtype=torch.bool).tril())


def test_shares_are_of_the_true_attention(heads: tuple[torch.Tensor, ...], given: Masked) -> None:
    rows = torch.tensor([200, 777])
    shares, _ = structured_heads.kept_on_rows(heads, rows, given.keeps())
    for head in range(HEADS):
        for number, row in enumerate(rows.tolist()):
            kept = given.mask[head, row // TILE].repeat_interleave(TILE)[: row + 1]
            expected = float(true_mass(heads, head, row)[kept].sum())
            assert float(shares[head, number]) == pytest.approx(expected, abs=1e-4)


def test_without_causal_a_row_sees_later_keys_of_its_block(given: Masked) -> None:
    heads = tuple(x.transpose(1, 2) for x in (given.query, given.key, given.value))
    rows = torch.tensor([130])
    shares, got = structured_heads.kept_on_rows(heads, rows, given.keeps(), causal=False)
    kept = given.mask[:, 1].repeat_interleave(TILE, -1)
    key, value = given.repeated()
    scores = (given.query[0, :, 130, None] * key[0]).sum(-1) / math.sqrt(SIZE)
    weights = scores.masked_fill(~kept, -math.inf).softmax(-1)
    torch.testing.assert_close(got[:, 0], (weights[..., None] * value[0]).sum(1))
    assert torch.equal(shares, structured_heads.kept_on_rows(heads, rows, given.keeps())[0])


def test_lists_name_the_blocks_of_the_mask(mask: torch.Tensor) -> None:
    counts, columns = listed(mask)
    again = torch.zeros_like(mask)
    for place in torch.cartesian_prod(torch.arange(HEADS), torch.arange(BLOCKS)).tolist():
        head, row = place
        chosen = columns[head, row, : int(counts[head, row])]
        assert chosen.tolist() == sorted(chosen.tolist())  # the diagonal last: FlashInfer's causal
        again[head, row, chosen.long()] = True
    assert torch.equal(again, mask)
    assert counts.dtype == columns.dtype == torch.int32


def test_rows_of_a_mask_name_its_blocks(mask: torch.Tensor) -> None:
    pointers, columns = bsr(mask[1])
    rows = [columns[a:b].tolist() for a, b in pairwise(pointers.tolist())]
    assert rows == [row.nonzero()[:, 0].tolist() for row in mask[1]]


def test_halves_keep_the_same_causal_keys(mask: torch.Tensor) -> None:
    whole, half = (
        m.repeat_interleave(n, 1).repeat_interleave(n, 2).tril()
        for m, n in ((mask, TILE), (halved(mask), TILE // 2))
    )
    assert torch.equal(whole, half)
    assert not halved(mask).triu(1).any()


def test_shared_mask_is_the_first_heads(given: Masked) -> None:
    rows = torch.tensor([500])
    assert not torch.equal(given.keeps()(1, rows), given.keeps()(0, rows))
    assert torch.equal(given.keeps(shared=True)(3, rows), given.keeps()(0, rows))


def test_halves_lack_the_later_half_of_the_rows_own_block(given: Masked) -> None:
    rows = torch.tensor([400])
    causal = torch.arange(given.tokens) <= rows[:, None]
    halves = given.keeps(block=64)(1, rows)
    assert torch.equal(halves & causal, given.keeps()(1, rows) & causal)
    assert halves.sum() < given.keeps()(1, rows).sum()


def test_estimate_sums_columns_and_diagonals(given: Masked) -> None:
    key, _ = given.repeated()
    columns, diagonals = vertical_slash.estimate(given.query, key)
    first = TOKENS - vertical_slash.PROBE
    scores = given.query[0, :, first:] @ key[0].transpose(1, 2) / math.sqrt(SIZE)
    at = torch.arange(TOKENS)
    weights = scores.masked_fill(at[first:, None] < at, -math.inf).softmax(-1)
    free = slice(vertical_slash.FIRST, None)
    torch.testing.assert_close(columns[0][:, free], weights.sum(1)[:, free])
    for distance in (vertical_slash.NEAREST, 333, first, TOKENS - 1):
        rows = at[first:][at[first:] >= distance]
        expected = weights[:, rows - first, rows - distance].sum(1)
        torch.testing.assert_close(diagonals[0, :, TOKENS - 1 - distance], expected)
    _, away = vertical_slash.pick(columns, diagonals, 40, 150)
    assert set(range(vertical_slash.NEAREST)) <= set(away[0, 0].tolist())


def test_slashes_of_a_head_are_found(heads: tuple[torch.Tensor, ...], given: Masked) -> None:
    draw = torch.Generator().manual_seed(1)
    torch.rand(structured_heads.SHARP, generator=draw)
    for _ in range(GROUPS):
        torch.randint(structured_heads.SINKS, TOKENS, (structured_heads.COLUMNS,), generator=draw)
    away = structured_heads.distances(TOKENS, draw)
    _, found = vertical_slash.pick(
        *vertical_slash.estimate(given.query, given.repeated()[0]), 30, 110
    )
    assert set(away) <= set(found[0, 0].tolist())


def test_indexes_keep_blocks_and_columns() -> None:
    indexes = vertical_slash.Indexes(
        torch.tensor([[[1, 1]]]), torch.tensor([[[[0, 0], [64, 0]]]]),
        torch.tensor([[[0, 2]]]), torch.tensor([[[[0, 0], [3, 17]]]]),
    )  # fmt: skip
    kept = indexes.keeps(0, torch.tensor([5, 100]))
    assert kept[0].nonzero()[:, 0].tolist() == list(range(64))
    assert kept[1].nonzero()[:, 0].tolist() == [3, 17, *range(64, 128)]
    assert indexes.density == pytest.approx((2 * 64 + 2) / (3 * 64))


def test_number_of_slashes_is_found() -> None:
    near = vertical_slash.size_for(lambda slash: slash / 131072, 131072, 0.15)
    assert abs(near / 131072 - 0.15) < 0.01


def test_a_cut_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    line = {"tokens": 8192, "wanted": 0.15, "peer": "flex", "ms": 1.0}
    failed = {"tokens": 8192, "wanted": 0.15, "peer": "flashinfer", "why": "ImportError"}
    file.write_text("".join(json.dumps(x) + "\n" for x in (line, failed)) + '{"tok')
    done = block_sparse_peers.results_in(file)
    assert done == [line, failed]
    assert file.read_text().endswith("}\n")
    names = ("flex", "flashinfer")
    assert block_sparse_peers.left_to_do(done, 8192, 0.15, names) == ["cuDNN", "flashinfer"]
    assert block_sparse_peers.left_to_do(done, 8192, 0.15, ["flex"]) == []
    assert block_sparse_peers.left_to_do(done, 8192, 0.3, ["flex"]) == ["cuDNN", "flex"]


def test_a_missing_peer_says_why(
    given: Masked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cudnn.block_sparse_attention", None)
    case = block_sparse_peers.Case(TOKENS, 0.15, 0.5, None, given)  # type: ignore[arg-type]
    found = dict(block_sparse_peers.contenders(None, case, ["cudnn-frontend 128"]))  # type: ignore[arg-type]
    why = found["cudnn-frontend 128"]
    assert isinstance(why, str)
    assert "cudnn" in why
    row = {"tokens": 1024, "wanted": 0.15, "peer": "cudnn-frontend 128", "why": why}
    assert "not measured" in block_sparse_peers.line_of(row)


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        block_sparse_peers.parse(["library.so", "--only", "flax"])
    assert "this operator, cuDNN" in capsys.readouterr().err
