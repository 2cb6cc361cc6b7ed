"""BlockSparseAttention's CUDA kernels without ONNX Runtime: are they right, and what do they cost?

    python -m benchmarks.block_sparse_kernels custom_ops/libtrianglemix_cuda.so

Checks the choice of blocks against the rule in float64, and the output against attention over the
kernel's own choice, on random calls (ragged, padded, chunked, capped, growing scores). Then times
sampled scores with selection, attention, and the dense mode, at densities that `mass` sets on
random data and `block_mask` tells, beside torch's cuDNN attention. Milliseconds on the device,
medians.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.cuda_library import BLOCK_SPARSE
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN

from benchmarks.block_sparse_calls import BlockCall, check, check_long, timed_call
from benchmarks.device_time import event_time, kernel_times
from benchmarks.kernel_versions import Call, Library
from benchmarks.machine import describe_run

ROUNDS: Final = 3
EVERY: Final = 0.9999995  # a mass that keeps all blocks of random data, short of the dense one


def density(library: Library, call: BlockCall) -> float:
    """Kept share of causal (tile, block) pairs, forced ones included."""
    library.run(call)
    rows, tiles = call.rows(0), call.mask.shape[-1]
    pairs = sum(tile + 1 for tile in range(tiles) if rows.has_rows(tile))
    return float(call.mask.float().sum()) / (call.mask.shape[1] * pairs)


def mass_of(library: Library, size: tuple[int, int], wanted: float) -> tuple[float, float]:
    """The mass that gives the wanted density on random data, and the density."""
    low, high = 0.0, 1.0
    torch.manual_seed(0)
    call = timed_call(size, BlockRule(min_length=0), wants_mask=True)
    for _ in range(12):
        mass = (low + high) / 2
        call.rule = BlockRule(mass, min_length=0)
        got = density(library, call)
        if abs(got - wanted) < 0.002:
            break
        low, high = (mass, high) if got < wanted else (low, mass)
    return mass, got


def measure(
    libraries: tuple[Library, Library], size: tuple[int, int], wanted: list[float]
) -> dict[str, dict[str, float]]:
    """Milliseconds by contender: `choice`, `attention`, `whole` (append apart), and densities."""
    blocks, dense = libraries
    torch.manual_seed(0)
    masses = {want: mass_of(blocks, size, want) for want in wanted}
    masses[1.0] = (EVERY, 1.0)  # scores computed, and all bits set
    calls = {
        want: timed_call(size, BlockRule(mass, min_length=0)) for want, (mass, _) in masses.items()
    }
    base = timed_call(size, BlockRule())
    twin = Call(
        DENSE_PATTERN, base.query, base.key, base.value, base.cache, base.ends, base.prompts,
        base.first_valid,
    )  # fmt: skip
    q, k, v = (x.transpose(1, 2).contiguous() for x in (base.query, base.key, base.value))

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    rounds: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(ROUNDS):
        rounds.setdefault("dense mode", []).append(parts_of(lambda: dense.run(twin)))
        for want, call in calls.items():
            times = parts_of(lambda call=call: blocks.run(call))  # type: ignore[misc]
            rounds.setdefault(f"density {want}", []).append(times)
        if size[0] == size[1]:  # its causal mask is the square one
            rounds.setdefault("cuDNN", []).append((0.0, 0.0, event_time(cudnn, 3)))
    result = {}
    for name, times in rounds.items():
        columns = (statistics.median(column) for column in zip(*times, strict=True))
        result[name] = dict(zip(("choice", "attention", "whole"), columns, strict=True))
    for want, (mass, got) in masses.items():
        result[f"density {want}"] |= {"mass": mass, "density": got}
    return result


def parts_of(run: Callable[[], object]) -> tuple[float, float, float]:
    """Milliseconds of choice and attention, and of both."""
    kernels = kernel_times(run, 3)
    choice, attention = (
        sum(ms for kernel, ms in kernels.items() if part in kernel)
        for part in ("choice", "attention")
    )
    return choice, attention, choice + attention


def show(size: str, result: dict[str, dict[str, float]]) -> None:
    """Prints one line a contender."""
    dense = result["dense mode"]["whole"]
    cudnn = result.get("cuDNN", {"whole": math.nan})["whole"]
    for name, times in result.items():
        told = f"density {times['density']:.3f}" if "density" in times else ""
        print(
            f"{size:>10} {name:12} choice {times['choice']:8.3f} "
            f"attention {times['attention']:8.3f} both {times['whole']:8.3f} "
            f"cuDNN / this {cudnn / times['whole']:6.2f} "
            f"this / dense mode {times['whole'] / dense:6.3f}  {told}",
            flush=True,
        )


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--calls", type=int, default=40, help="random calls for each head size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", default="8192,32768,131072", help="or new tokens/keys")
    parser.add_argument("--long", type=int, default=262144, help="a long prompt to check; 0: none")
    parser.add_argument("--densities", default="0.15,0.3")
    parser.add_argument("--output", type=Path, help="JSON")
    o = parser.parse_args()
    results: dict[str, Any] = {"run": describe_run(["torch"]), "milliseconds": {}}
    print(json.dumps(results["run"]))
    blocks = Library(o.library, *BLOCK_SPARSE)
    check(blocks, o.calls, o.seed)
    if o.long:
        check_long(blocks, o.long)
    wanted = [float(x) for x in o.densities.split(",")]
    for told in filter(None, o.lengths.split(",")):
        new, _, keys = told.partition("/")
        size = (int(new), int(keys or new))
        results["milliseconds"][told] = measure((blocks, Library(o.library)), size, wanted)
        show(told, results["milliseconds"][told])
        if o.output:
            o.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
