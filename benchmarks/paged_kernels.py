"""Block-sparse attention to keys by pages beside keys in one piece: the same bits, at what cost?

    python -m benchmarks.paged_kernels --output paged_kernels.json

A chunk of a prompt on a cache laid out as vLLM's is, pages dealt out at random (B=1, H=32, G=8,
D=128, bfloat16, unit-normal data, at a density that `mass` sets). Each page size has to give the
bits that keys in one piece give. Then, in turns on one card, median milliseconds on the device of
the choice of blocks and of attention, and of a call whose keys are first gathered into one piece.
Needs torch with CUDA, a Hopper GPU and the library in the package.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.cuda_library import BLOCK_SPARSE, cuda_library_path
from trianglemix.pytorch.cuda_call import Inputs, run_kernels
from trianglemix.pytorch.paged_call import KeyPages, PagedInputs, attend_pages

from benchmarks.block_sparse_kernels import mass_of
from benchmarks.device_time import kernel_times
from benchmarks.kernel_versions import Library
from benchmarks.machine import describe_run

HEADS, KV_HEADS, D = 32, 8, 128
PARTS: Final = ("choice", "attention")


def by_pages(key: Tensor, value: Tensor, size: int) -> KeyPages:
    """`key [1, G, T, D]` and `value` in pages of `size` slots, a key's value behind it."""
    G, T = key.shape[1:3]
    both = torch.cat((key[0], value[0]), -1).unflatten(1, (T // size, size)).transpose(0, 1)
    order = torch.randperm(T // size, device="cuda")
    pool = torch.empty(T // size, G, size, 2 * D, dtype=key.dtype, device="cuda")
    pool[order] = both
    return KeyPages(pool[..., :D], pool[..., D:], order.int()[None])


def gathered(pages: KeyPages, table: Tensor) -> tuple[Tensor, Tensor]:
    """`[1, G, T, D]` each; `table` is the pages' own, as torch's indices are."""
    pools = (pages.key, pages.value)
    key, value = (pool[table].transpose(0, 1).flatten(1, 2)[None] for pool in pools)
    return key, value


def contenders(
    chunk: int, tokens: int, mass: float, sizes: list[int]
) -> dict[str, Callable[[], Tensor]]:
    """Calls of `chunk` new tokens that end in the middle of their prompt, by name."""
    torch.manual_seed(0)
    query = torch.randn(1, chunk, HEADS, D, device="cuda").bfloat16().transpose(1, 2)
    key, value = (torch.randn(1, KV_HEADS, tokens, D, device="cuda").bfloat16() for _ in "kv")
    integers = torch.tensor([tokens - 1, 2 * tokens, 0], dtype=torch.int32, device="cuda")
    end, prompt, first = integers[:, None]
    rule = BlockRule(mass, min_length=0)
    numbers = {
        "sink": rule.num_sink_tokens, "window": rule.sliding_window_size,
        "last": rule.num_last_tokens, "scale": D**-0.5, "softcap": 0.0, "mass": mass,
        "min_length": 0,
    }  # fmt: skip

    def whole(k: Tensor, v: Tensor) -> Tensor:
        return run_kernels("block_sparse", Inputs(query, k, v, end, prompt, first), numbers)

    calls: dict[str, Callable[[], Tensor]] = {"one piece": lambda: whole(key, value)}
    for size in sizes:
        pages = by_pages(key, value, size)
        given = PagedInputs(query, pages, end, prompt, tokens)
        table = pages.table[0].long()
        calls[f"pages of {size}"] = lambda given=given: attend_pages(given, numbers)  # type: ignore[misc]
        calls[f"pages of {size}, gathered"] = lambda pages=pages, table=table: whole(  # type: ignore[misc]
            *gathered(pages, table)
        )
    return calls


def milliseconds(run: Callable[[], Tensor]) -> dict[str, float]:
    """Of the choice, of attention, and of all kernels of a call."""
    kernels = kernel_times(run, 3)
    found = {
        part: sum(ms for name, ms in kernels.items() if f"{part}_sm90" in name) for part in PARTS
    }
    return found | {"whole": sum(kernels.values())}


def measure(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians by contender, the order turned every round: a hot card clocks later ones lower.

    Raises:
        SystemExit: one gives other bits than the first.
    """
    expected = calls["one piece"]()
    for name, run in calls.items():
        if not torch.equal(run(), expected):
            raise SystemExit(f"{name}: other bits than keys in one piece give")
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(milliseconds(calls[name]))
    return {
        name: {part: statistics.median(x[part] for x in found) for part in (*PARTS, "whole")}
        for name, found in samples.items()
    }


def main() -> None:
    """Compares bits, then times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--sizes", default="16,32,64,128")
    parser.add_argument("--densities", default="0.15,0.3")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    report: dict[str, Any] = {"run": describe_run(["torch"]), "milliseconds": {}}
    print(json.dumps(report["run"]))
    library = Library(cuda_library_path(), *BLOCK_SPARSE)
    for tokens in map(int, o.lengths.split(",")):
        for wanted in map(float, o.densities.split(",")):
            mass, density = mass_of(library, (o.chunk, tokens), wanted)
            calls = contenders(o.chunk, tokens, mass, [int(x) for x in o.sizes.split(",")])
            found = measure(calls, o.rounds)
            what = f"{o.chunk} on {tokens} at {density:.3f}"
            report["milliseconds"][what] = found
            for name, times in found.items():
                shares = ", ".join(
                    f"{part} {ms:7.3f} ({ms / (found['one piece'][part] or 1):5.3f})"
                    for part, ms in times.items()
                )
                print(f"{what}: {name:24} {shares}", flush=True)
            if o.output:
                o.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
