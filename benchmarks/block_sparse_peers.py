"""BlockSparseAttention beside its peers on one GPU: the same blocks, the same tensors, one run.

    python -m benchmarks.block_sparse_peers custom_ops/libtrianglemix_cuda.so

B=1 H=32 G=8 D=128, bfloat16, queries and keys with structure (`benchmarks.structured_heads`). At
each length `mass` is set for a density, and the operator's own `block_mask` is what every peer
gets, per head, in blocks of 128 (cuDNN-frontend in blocks of 64, too). MInference has a pattern of
its own: it is timed at the nearest density that its number of slashes gives. Milliseconds on the
device, medians of rounds in turn; what makes a peer's indexes is apart ("prepare", wall clock), for
ours "choice". Each peer's output is compared with float32 attention on 64 rows over what it is to
keep, and the share of true attention kept there (recall) is told.

A peer whose package is not there prints why. One result is a line of `--output`; what is there is
not measured again, so a run that was cut off goes on, and `--only` picks peers. Every run times
torch's cuDNN attention for its own ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.cuda_library import BLOCK_SPARSE
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN

from benchmarks.block_sparse_calls import BlockCall
from benchmarks.block_sparse_kernels import density
from benchmarks.device_time import event_time, kernel_times
from benchmarks.kernel_versions import Library
from benchmarks.machine import describe_run
from benchmarks.masked_peers import PEERS, Masked, Peer
from benchmarks.structured_heads import (
    Keeps,
    kept_on_rows,
    recall_figures,
    some_rows,
    structured_heads,
)
from benchmarks.vertical_slash import (
    BLOCK,
    estimate,
    index_for,
    load_minference,
    pick,
    size_for,
)

OURS: Final = "this operator"
MINFERENCE: Final = "minference"
NAMES: Final = (OURS, *PEERS, MINFERENCE)
COLUMNS_OF: Final = 128  # MInference: one column for so many tokens
NEAR: Final = 0.005
# Rules without a kernel here, measured earlier by us (2026-11-27, one H100): SmolLM2-135M-Instruct
# in bf16, 8,000 tokens, retrieval among 4 keys, 140 or 150 paired samples; the shipped plan's 20
# triangle layers, the rule in the ten others. Right, points against the plan alone (with half of
# the 95 % interval), kept share of block pairs, recall: mean, 5th percentile, worst head.
EARLIER: Final = (
    ("none (dense there)", 0.479, 0, 0, 1.0, 1.0, 1.0, 1.0),
    ("pooled keys, 0.18 of the largest", 0.329, -15, 8, 0.29, 0.79, 0.43, 0.64),
    ("pooled keys, 0.05 of the largest", 0.379, -10, 8, 0.45, 0.90, 0.61, 0.80),
    ("two bands pooled, top-p .95", 0.271, -21, 7, 0.49, 0.84, 0.54, 0.73),
    ("antidiagonal sums, stride 8, top-p .9", 0.293, -19, 7, 0.32, 0.84, 0.55, 0.73),
    ("random blocks", 0.314, -16, 9, 0.41, 0.70, 0.32, 0.54),
    ("true mass, top-p .9", 0.486, 1, 4, 0.32, 0.94, 0.90, 0.91),
    ("8 exact rows of a tile, top-p .95", 0.467, -1, 4, 0.38, 0.96, 0.91, 0.93),
    ("8 exact rows of a tile, top-p .9", 0.460, -1, 5, 0.31, 0.93, 0.86, 0.89),
    ("8 exact rows of a tile, top-p .8", 0.453, -2, 5, 0.25, 0.88, 0.76, 0.80),
)


@dataclass
class Contender:
    """One call to time: what it keeps, and what is known of it before it runs."""

    run: Callable[[], torch.Tensor]  # the output [1, H, S, D]
    keeps: Keeps | None  # None: every key
    causal: bool
    facts: dict[str, Any]
    parts: dict[str, Callable[[], object]]  # timed apart, by name


@dataclass(frozen=True)
class Case:
    """A length in tokens, a density, our call at it, and the peers' view of the same tensors."""

    tokens: int
    wanted: float
    got: float
    call: BlockCall
    given: Masked


def block_call(tokens: int) -> BlockCall:
    """Our operator's call on structured heads, with the mask wanted."""
    query, key, value = structured_heads(tokens)
    cache = tuple(x.transpose(1, 2).contiguous() for x in (key, value))
    return BlockCall(
        DENSE_PATTERN, query, key, value, (cache[0], cache[1]), [tokens], [tokens], [0],
        rule=BlockRule(min_length=0),
    )  # fmt: skip


def set_density(library: Library, call: BlockCall, wanted: float) -> float:
    """Moves the call's mass until the density is within .005, if it can; returns the density."""
    low, high, got = 0.0, 1.0, 1.0
    for _ in range(14):
        mass = (low + high) / 2
        call.rule = BlockRule(mass, min_length=0)
        got = density(library, call)
        if abs(got - wanted) <= NEAR:
            break
        low, high = (mass, high) if got < wanted else (low, mass)
    return got


def case_of(library: Library, tokens: int, wanted: float) -> Case:
    """The tensors and blocks of a length and density."""
    call = block_call(tokens)
    got = set_density(library, call, wanted)
    mask = call.mask[0].bool()
    given = Masked(call.query.transpose(1, 2).contiguous(), *call.cache, mask)
    call.wants_mask = False
    return Case(tokens, wanted, got, call, given)


def ours(library: Library, case: Case) -> Contender:
    """The operator, which chooses the blocks itself."""

    def run() -> torch.Tensor:
        library.run(case.call)
        return case.call.output.transpose(1, 2)

    facts = {"mass": case.call.rule.mass, "density": case.got, "note": "chooses the blocks"}
    return Contender(run, case.given.keeps(), True, facts, {})


def masked(peer: Peer, case: Case) -> Contender:
    """A peer that takes the mask."""
    started = time.perf_counter()
    run = peer.prepare(case.given)
    torch.cuda.synchronize()
    facts: dict[str, Any] = {"prepare_ms": 1e3 * (time.perf_counter() - started)}
    keeps = case.given.keeps(peer.shared, peer.block) if peer.sparse else None
    facts |= {"density": _density_of(case, peer), "note": peer.note}
    return Contender(run, keeps, peer.causal, facts, {})


def _density_of(case: Case, peer: Peer) -> float:
    if not peer.sparse:
        return 1.0
    mask = case.given.mask[:1] if peer.shared else case.given.mask
    return float(mask.float().sum()) / (len(mask) * mask.shape[-1] * (mask.shape[-1] + 1) / 2)


def minference(case: Case) -> Contender:
    """MInference's vertical-slash, all heads in one call; its parts apart."""
    kernels = load_minference()
    convert, S = kernels.convert_vertical_slash_indexes, case.tokens
    query, (key, value) = case.given.query, case.given.repeated()
    vertical = max(1, S // COLUMNS_OF)
    sums = estimate(query, key)

    def density_at(slash: int) -> float:
        return index_for(convert, *pick(*sums, vertical, slash), S).density

    slash = size_for(density_at, S, case.wanted)
    picked = pick(*sums, vertical, slash)
    indexes = index_for(convert, *picked, S)
    lengths = torch.tensor([S], dtype=torch.int32, device=query.device)

    def run() -> torch.Tensor:
        found = pick(*estimate(query, key), vertical, slash)
        result: torch.Tensor = kernels.vertical_slash_sparse_attention(query, key, value, *found)
        return result

    facts = {"density": indexes.density, "vertical": vertical, "slash": slash,
             "note": "own pattern; K and V copied to every head"}  # fmt: skip
    parts: dict[str, Callable[[], object]] = {
        "estimate": lambda: pick(*estimate(query, key), vertical, slash),
        "indexes": lambda: index_for(convert, *picked, S),
        "attention": lambda: kernels._triton_mixed_sparse_attention(
            query, key, value, lengths, indexes.block_count, indexes.block_offset,
            indexes.column_count, indexes.column_index, query.shape[-1] ** -0.5, BLOCK, BLOCK,
        ),
    }  # fmt: skip
    return Contender(run, indexes.keeps, True, facts, parts)


def contenders(
    library: Library, case: Case, names: Sequence[str]
) -> Iterator[tuple[str, Contender | str]]:
    """Each by name, or why it is not there."""
    for name in names:
        try:
            if name == OURS:
                yield name, ours(library, case)
            elif name == MINFERENCE:
                yield name, minference(case)
            else:
                yield name, masked(PEERS[name], case)
        except Exception as error:  # a peer's own failure is a result, whatever it is
            yield name, _why(error)
        gc.collect()
        torch.cuda.empty_cache()


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def look(case: Case, contender: Contender) -> dict[str, float]:
    """Recall, and how far the output is off on some rows, as a share of the largest value."""
    rows = some_rows(case.tokens)
    got = contender.run()[0][:, rows.to(case.given.query.device)].float()
    call = case.call
    keeps = contender.keeps or _every_key(case.tokens)
    heads = (call.query, case.given.key.transpose(1, 2), case.given.value.transpose(1, 2))
    shares, expected = kept_on_rows(heads, rows, keeps, contender.causal)
    off = float((got - expected).abs().max() / expected.abs().max())
    return recall_figures(shares) | {"off": off}


def _every_key(tokens: int) -> Keeps:
    return lambda head, rows: torch.ones(len(rows), tokens, dtype=torch.bool, device=rows.device)


def measure(name: str, contender: Contender, repeats: int) -> dict[str, float]:
    """Milliseconds of a call; of ours without the append, choice and attention apart."""
    if name != OURS:
        return {"ms": event_time(contender.run, repeats, 1)}
    kernels = kernel_times(contender.run, repeats, 1)
    parts = {
        part: sum(ms for kernel, ms in kernels.items() if part in kernel)
        for part in ("choice", "attention")
    }
    return {"ms": sum(parts.values()), **parts}


def compare(
    library: Library, case: Case, names: Sequence[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """One result for each name; those that run are timed in turn, the order turned each round."""
    ready: dict[str, Contender] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, contender in contenders(library, case, names):
        head = {"tokens": case.tokens, "wanted": case.wanted, "peer": name}
        results[name] = head | ({"why": contender} if isinstance(contender, str) else {})
        if isinstance(contender, str):
            continue
        try:
            results[name] |= contender.facts | look(case, contender)
            results[name] |= {f"{part}_ms": event_time(run, 2, 1)
                              for part, run in contender.parts.items()}  # fmt: skip
            ready[name] = contender
        except Exception as error:  # as above
            results[name]["why"] = _why(error)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    for number in range(rounds):
        for name in list(ready) if number % 2 == 0 else list(ready)[::-1]:
            times[name].append(measure(name, ready[name], 2))
    medians = {
        name: {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        for name, rows in times.items()
    }
    for name, result in results.items():
        if name in medians:
            result |= medians[name]
            if "cuDNN" in medians:
                result["cudnn_over_this"] = medians["cuDNN"]["ms"] / result["ms"]
        yield result


def line_of(result: dict[str, Any]) -> str:
    """A result as a row of the table."""
    head = f"{result['tokens']:7} {result['wanted']:4} {result['peer']:20}"
    if "why" in result:
        return f"{head} not measured: {result['why']}"
    extra = "  ".join(
        f"{name} {result[key]:.3f}"
        for name, key in (
            ("choice", "choice"), ("prepare", "prepare_ms"), ("estimate", "estimate_ms"),
            ("indexes", "indexes_ms"), ("attention", "attention_ms"), ("attention", "attention"),
        ) if key in result
    )  # fmt: skip
    ratio = f"{result['cudnn_over_this']:6.2f}" if "cudnn_over_this" in result else "     -"
    return (
        f"{head} {result['ms']:9.3f} ms {ratio} of cuDNN  density {result['density']:.3f}  "
        f"recall {result['recall']:.3f} ({result['recall_5th_percentile']:.3f}, "
        f"{result['recall_worst_head']:.3f})  off {result['off']:.1e}  {extra}  {result['note']}"
    )


def print_earlier() -> None:
    """The rules that are compared by accuracy alone."""
    print("\nRules by accuracy alone: our measurement on SmolLM2, 2026-11-27, one H100")
    for rule, right, against, half, share, *recall in EARLIER:
        figures = ", ".join(f"{x:.2f}" for x in recall)
        print(f"  {rule:38} right {right:.3f}  against the plan {against:+d} +- {half} points  "
              f"density {share:.2f}  recall {figures}")  # fmt: skip


def results_in(file: Path) -> list[dict[str, Any]]:
    """What earlier runs measured; a line that was cut off is dropped from the file, too."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def left_to_do(
    done: Sequence[dict[str, Any]], tokens: int, wanted: float, names: Sequence[str]
) -> list[str]:
    """The names without figures yet, and cuDNN for their ratios; none where all have some."""
    have = {
        x["peer"]
        for x in done
        if "ms" in x and (x["tokens"], x["wanted"]) == (tokens, wanted)
    }  # fmt: skip
    left = [name for name in names if name not in have]
    return [name for name in NAMES if name in left or name == "cuDNN"] if left else []


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: `--only` names no peer; says which there are.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--lengths", default="8192,32768,131072", help="multiples of 128")
    parser.add_argument("--densities", default="0.15,0.3")
    parser.add_argument("--only", default=",".join(NAMES), help="peers, by name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/block_sparse_peers.jsonl"))
    o = parser.parse_args(arguments)
    o.names = [name.strip() for name in o.only.split(",")]
    if unknown := [name for name in o.names if name not in NAMES]:
        parser.error(f"--only names {unknown}; choose among {', '.join(NAMES)}")
    return o


def main() -> None:
    """Measures what is left, prints the tables."""
    o = parse()
    run = describe_run(["torch"])
    print(json.dumps(run), flush=True)
    library = Library(o.library, *BLOCK_SPARSE)
    o.output.parent.mkdir(parents=True, exist_ok=True)
    done = results_in(o.output)
    for tokens in map(int, o.lengths.split(",")):
        for wanted in map(float, o.densities.split(",")):
            names = left_to_do(done, tokens, wanted, o.names)
            if not names:
                continue
            case = case_of(library, tokens, wanted)
            for result in compare(library, case, names, o.rounds):
                with o.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result | {"run": run}) + "\n")
                print(line_of(result), flush=True)
            del case
            gc.collect()
            torch.cuda.empty_cache()
    print_earlier()


if __name__ == "__main__":
    main()
