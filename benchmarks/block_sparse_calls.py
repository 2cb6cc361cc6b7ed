"""Calls of BlockSparseAttention's CUDA kernels, and whether what they give is right.

The choice of blocks is compared with the rule in float64, the output with attention over the
kernel's own choice.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.rule import Rows, kept_blocks, undecided_blocks
from trianglemix.custom_ops.cuda_library import BlockSparseProblem, Problem
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN

from benchmarks.kernel_versions import Call, Library
from tests.custom_ops.tolerances import BANDS, TOLERANCES

ALL: Final = slice(None)
NAMES: Final = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class BlockCall(Call):
    """Inputs of one call; `wants_mask` is whether it has the optional output."""

    rule: BlockRule = field(default_factory=BlockRule)
    wants_mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        B, _, H, _ = self.query.shape
        most = -(-self.cache[0].shape[2] // TILE)
        shape = (B, H, most, most) if self.wants_mask else (0,)
        self.mask = torch.full(shape, 7, dtype=torch.uint8, device="cuda")

    def new_problem(self) -> Problem:
        rule = self.rule
        p = BlockSparseProblem(mass=rule.mass, min_length=rule.min_length)
        p.sink, p.window, p.last = (
            rule.num_sink_tokens, rule.sliding_window_size, rule.num_last_tokens,
        )  # fmt: skip
        p.block_mask = self.mask.data_ptr() if self.wants_mask else None
        return p

    def rows(self, b: int) -> Rows:
        """The slots of a batch row."""
        start = max(0, self.ends[b] - self.query.shape[1])
        return Rows(self.first_valid[b], start, self.ends[b], self.prompts[b])

    def scores(self, b: int, rows: slice = ALL, heads: slice = ALL) -> torch.Tensor:
        """`[H, S, T]` in float64, of keys that the row has or not."""
        D, H = self.query.shape[-1], self.query.shape[2]
        keys = self.cache[0][b].repeat_interleave(H // self.cache[0].shape[1], 0)[heads]
        keys, query = keys.double().nan_to_num(), self.query[b, rows, heads].double()
        scores = torch.einsum("shd,htd->hst", query, keys) * D**-0.5
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def causal(self, b: int, which: slice = ALL) -> torch.Tensor:
        """`[S, T]`: the keys before each row, without any choice."""
        rows, S = self.rows(b), self.query.shape[1]
        i = rows.start + torch.arange(S, device="cuda")[which, None]
        j = torch.arange(self.cache[0].shape[2], device="cuda")[None]
        return (j >= rows.first_valid) & (j <= i) & (i < rows.end)

    def expected(self) -> torch.Tensor:
        """The output over the blocks of `mask`, in float64."""
        result = torch.zeros(self.query.shape, dtype=torch.float64, device="cuda")
        S, T = self.query.shape[1], self.cache[0].shape[2]
        for b in range(len(self.ends)):
            rows = self.rows(b)
            i, j = rows.start + torch.arange(S), torch.arange(T)
            tile, block = ((x - rows.first_valid).clamp(0) // TILE for x in (i, j))
            tile = tile.clamp(max=self.mask.shape[-1] - 1)
            kept = self.mask[b].bool()[:, tile][:, :, block] & self.causal(b)
            weights = self.scores(b).masked_fill(~kept, -math.inf).softmax(-1).nan_to_num()
            values = self.cache[1][b].double().nan_to_num()
            values = values.repeat_interleave(weights.shape[0] // values.shape[0], 0)
            result[b] = torch.einsum("hst,htd->shd", weights, values)
        return result

    def wrong_choices(self) -> list[str]:
        """Tiles whose blocks are neither the rule's nor within its band; their number is told."""
        band, wrong = BANDS[NAMES[self.query.dtype]], list[str]()
        for b in range(len(self.ends)):
            rows = self.rows(b)
            masses = self.scores(b).masked_fill(~self.causal(b), -math.inf).softmax(-1)
            for tile in range(self.mask.shape[-1]):
                got = self.mask[b, :, tile].cpu().numpy()
                wrong += [
                    f"row {b} head {h} tile {tile}: {line.nonzero()[0]}"
                    for h, line in enumerate(got)
                    if self._is_wrong(line, rows, tile, masses[h], band)
                ]
        return wrong

    def _is_wrong(
        self, got: np.ndarray, rows: Rows, tile: int, masses: torch.Tensor, band: float
    ) -> bool:
        """`got [C]` of one head, whose probabilities are `masses [S, T]`, or the tile's alone."""
        if not rows.has_rows(tile) or tile >= rows.num_tiles:
            return bool(got.any())
        if rows.is_dense(tile, self.rule):
            return not (got[: tile + 1] == 1).all() or bool(got[tile + 1 :].any())
        first = rows.start if len(masses) == self.query.shape[1] else tile * TILE
        sampled = masses[torch.from_numpy(rows.sampled(tile) - first).cuda()]
        sampled = sampled.sum(0)[rows.first_valid : rows.first_valid + TILE * (tile + 1)]
        padded = torch.nn.functional.pad(sampled, (0, TILE * (tile + 1) - len(sampled)))
        sums = padded.view(tile + 1, TILE).sum(1).cpu().numpy()
        differs = got[: tile + 1].astype(bool) != kept_blocks(sums, tile, self.rule)
        differs &= ~undecided_blocks(sums, tile, self.rule, band)
        return bool(differs.any() or got[tile + 1 :].any())

    def check_tile(self, tile: int, head: int, what: str) -> None:
        """Compares one whole tile of a prompt without padding, of one head.

        Raises:
            SystemExit: its blocks or its output are wrong.
        """
        rows, heads = slice(tile * TILE, (tile + 1) * TILE), slice(head, head + 1)
        scores = self.scores(0, rows, heads)[0].masked_fill(~self.causal(0, rows), -math.inf)
        name = NAMES[self.query.dtype]
        got = self.mask[0, head, tile]
        args = (got.cpu().numpy(), self.rows(0), tile, scores.softmax(-1), BANDS[name])
        if self._is_wrong(*args):
            raise SystemExit(f"{what}: blocks of tile {tile}, head {head}")
        kept = got.bool().repeat_interleave(TILE)[: scores.shape[1]]
        weights = scores.masked_fill(~kept, -math.inf).softmax(-1)
        value = self.cache[1][0, head * self.cache[1].shape[1] // self.query.shape[2]]
        expected = weights @ value.double()
        off = float((self.output[0, rows, head].double() - expected).abs().max())
        if not off <= TOLERANCES[name] * float(expected.abs().max()):
            raise SystemExit(f"{what}: off by {off} in tile {tile}, head {head}")


def random_call(pick: random.Random, dtype: torch.dtype, D: int) -> BlockCall:
    """Any rule and lengths; slots outside a row's keys hold NaN."""
    G, group, B = pick.choice([1, 2]), pick.choice([1, 3, 4, 7, 8]), pick.choice([1, 1, 2, 3])
    S = pick.choice([1, 15, 16, 40, 128, 500, 1100, 1900, 1900])
    T = S + pick.choice([0, 0, 5, 128, 300, 1400])
    ends = [T if pick.random() < 0.5 else pick.randint(min(S, 1), T) for _ in range(B)]
    first = [pick.choice([0, 0, min(T - S, end), pick.randint(0, end)])
             for end in ends]  # fmt: skip
    prompts = [end + pick.choice([0, 0, 700, 3000, -200]) for end in ends]
    rule = BlockRule(
        pick.choice([0.05, 0.3, 0.8, 0.9, 0.95, 0.99, 1.0]), pick.choice([0, 0, 0, 600]),
        pick.choice([0, 8, 129]), pick.choice([1, 128, 129, 300, -1]), pick.choice([1, 128, 300]),
    )  # fmt: skip
    sharpness = pick.choice([0.3, 1.0, 4.0])
    query = torch.randn(B, S, G * group, D, device="cuda").mul(sharpness).to(dtype)
    cache = tuple(torch.randn(B, G, T, D, device="cuda") for _ in range(2))
    if pick.random() < 0.4:  # a direction that all queries share, and keys that grow along it
        growth = torch.linspace(1, 0, T, device="cuda") * pick.choice(
            [-8.0, 8.0] if dtype == torch.float32 else [-8.0, 8.0, 40.0]  # whose scores lose digits
        )
        along = torch.randn(D, device="cuda") / D**0.5
        query = (query.float() + 4 * along).to(dtype)
        cache[0].add_(growth[:, None] * along * D**0.5)
    cache = tuple(x.to(dtype) for x in cache)
    fresh = list[torch.Tensor]()
    for old in cache:
        new = torch.zeros(B, S, G, D, device="cuda", dtype=dtype)
        for b, end in enumerate(ends):
            start = max(0, end - S)
            new[b, : end - start] = old[b, :, start:end].transpose(0, 1)
            old[b, :, start:end] = math.nan  # to be appended
            old[b, :, : first[b]] = old[b, :, end:] = math.nan
            new[b, : max(0, first[b] - start)] = math.nan
        fresh.append(new)
    softcap = pick.choice([0.0, 0.0, 0.0, 15.0])
    return BlockCall(
        DENSE_PATTERN, query, fresh[0], fresh[1], (cache[0], cache[1]), ends, prompts, first,
        softcap, rule,
    )  # fmt: skip


def check(library: Library, count: int, seed: int) -> None:
    """`count` random calls of each head size.

    Raises:
        SystemExit: a choice or an output is wrong, or two runs differ; says of which call.
    """
    for D in (64, 128, 256, 96, 80):
        worst, sparse, captured = 0.0, 0, 0
        for number in range(count):
            pick = random.Random(f"{seed} {D} {number}")
            torch.manual_seed(pick.getrandbits(32))
            dtype = pick.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
            call = random_call(pick, dtype, D)
            library.run(call)
            torch.cuda.synchronize()
            what = f"call {number} of head size {D}: "
            worst = max(worst, verify(library, call, what))
            mask, got = call.mask.clone(), call.output.clone()
            library.run(call)
            if not (torch.equal(got, call.output) and torch.equal(mask, call.mask)):
                raise SystemExit(f"{library.name}: two runs differ in {what}{describe(call)}")
            sparse += choosing_tiles(call)
            if not any(call.first_valid):
                replay_shorter(library, call, pick)
                worst = max(worst, verify(library, call, f"replayed {what}"))
                captured += 1
        print(
            f"head size {D}: {count} calls right, {captured} of them replayed with other lengths, "
            f"{sparse} tiles chose, error up to {worst:.1e}",
            flush=True,
        )


def verify(library: Library, call: BlockCall, what: str) -> float:
    """The largest error of a call that has run, as a share.

    Raises:
        SystemExit: a choice or the output is wrong.
    """
    what += describe(call)
    if wrong := call.wrong_choices():
        raise SystemExit(f"{library.name}: {len(wrong)} tiles of {what}: {wrong[:5]}")
    expected = call.expected()
    off, most = (float(x.abs().max()) for x in (call.output.double() - expected, expected))
    # Scores here are up to hundreds, whose last digit in float32 is no longer small.
    room = 10 if call.query.dtype == torch.float32 else 1
    if not off <= room * TOLERANCES[NAMES[call.query.dtype]] * most:
        raise SystemExit(f"{library.name}: off by {off} of {most} in {what}")
    return off / (most or 1.0)


def replay_shorter(library: Library, call: BlockCall, pick: random.Random) -> None:
    """Captures the call in a CUDA graph, and replays it with shorter rows."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.run(call)
    call.ends = [max(1, end - pick.choice([0, 1, 100, 700])) for end in call.ends]
    call.prompts = [end + pick.choice([0, 700]) for end in call.ends]
    call.write_lengths()
    call.output.fill_(math.nan)
    call.mask.fill_(7)
    graph.replay()
    torch.cuda.synchronize()


def choosing_tiles(call: BlockCall) -> int:
    """Tiles that choose their blocks, of one head."""
    return sum(
        call.rows(b).has_rows(tile) and not call.rows(b).is_dense(tile, call.rule)
        for b in range(len(call.ends))
        for tile in range(call.rows(b).num_tiles)
    )


def describe(call: BlockCall) -> str:
    """What a call is, in a line."""
    return (
        f"{call.query.dtype} {tuple(call.query.shape)} {tuple(call.cache[0].shape)} {call.rule} "
        f"ends {call.ends} prompts {call.prompts} first {call.first_valid} softcap {call.softcap}"
    )


def check_long(library: Library, tokens: int) -> None:
    """Some tiles of a prompt whose scores have no room as a whole.

    Raises:
        SystemExit: a tile is wrong.
    """
    torch.manual_seed(1)
    call = timed_call((tokens, tokens), BlockRule(0.5, min_length=0), wants_mask=True)
    library.run(call)
    torch.cuda.synchronize()
    tiles = tokens // TILE
    for tile in (0, 1, tiles // 3, tiles // 2 + 1, tiles - 2, tiles - 1):
        for head in (0, 13, 31):
            call.check_tile(tile, head, f"{library.name}: {tokens} tokens")
    print(f"{tokens} tokens: 18 tiles right", flush=True)


def timed_call(size: tuple[int, int], rule: BlockRule, wants_mask: bool = False) -> BlockCall:
    """B=1, H=32, G=8, D=128, bfloat16, unit-normal; `size` is new tokens and keys.

    A chunk ends in the middle of its prompt.
    """
    new, tokens = size
    prompt = tokens if new == tokens else 2 * tokens
    query, key, value = (torch.randn(1, new, n, 128, device="cuda").bfloat16() for n in (32, 8, 8))
    cache = tuple(torch.randn(1, 8, tokens, 128, device="cuda").bfloat16() for _ in range(2))
    return BlockCall(
        DENSE_PATTERN, query, key, value, (cache[0], cache[1]), [tokens], [prompt], [0],
        rule=rule, wants_mask=wants_mask,
    )  # fmt: skip
