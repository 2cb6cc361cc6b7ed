"""Builds of the CUDA library side by side, without ONNX Runtime: are they right, which is faster?

    python -m benchmarks.kernel_versions old/libtrianglemix_cuda.so new/libtrianglemix_cuda.so

Checks each build against float64 on random calls (ragged, padded, chunked, decode, dense, capped),
then times all of them in turn: a power-limited GPU clocks later contenders lower, so every round
turns the order. Milliseconds on the device, medians: attention, the append before it, and a whole
call of a captured chain, where the two may overlap.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from trianglemix.custom_ops.cuda_library import BFLOAT16, FLOAT16, FLOAT32, KernelTable, Problem
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep

from benchmarks.device_time import event_time, kernel_times
from benchmarks.machine import describe_run
from tests.custom_ops.tolerances import TOLERANCES

APPEND: Final = "append_kernel"
DTYPES: Final = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
TIMED: Final = {  # name: new tokens, keys, dense
    "prompt 1K": (1024, 1024, False),
    "prompt 8K": (8192, 8192, False),
    "prompt 32K": (32768, 32768, False),
    "prompt 128K": (131072, 131072, False),
    "dense 8K": (8192, 8192, True),
    "dense 32K": (32768, 32768, True),
    "decode 2K": (1, 2048, False),
    "decode 32K": (1, 32768, False),
    "4 tokens on 32K": (4, 32768, False),
}


class Library:
    """One build, by the path of its shared library, and one operator of it by its entry."""

    def __init__(
        self,
        path: Path,
        entry: str = "trianglemix_cuda_library",
        problem: type[Problem] = Problem,
    ) -> None:
        self.name = str(path)
        function = getattr(ctypes.CDLL(str(path.resolve())), entry)
        function.restype = ctypes.POINTER(KernelTable)
        self._table = function().contents
        if self._table.problem_bytes != ctypes.sizeof(problem):
            raise SystemExit(f"{path} has another {problem.__name__} than this script; build anew")

    def run(self, call: Call) -> None:
        """Enqueues append and attention on the current stream."""
        problem = call.problem()
        size = self._table.workspace_bytes(ctypes.addressof(problem))
        if call.workspace.numel() < size:
            call.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        error = self._table.run(ctypes.addressof(problem), call.workspace.data_ptr(), stream)
        if error:
            raise SystemExit(f"{self.name}: {error.decode()}")


@dataclass
class Call:
    """Inputs of one call, its cache in place: queries `[B, S, H, D]`, cache `[B, G, T, D]`."""

    pattern: TrianglePattern
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    ends: list[int]
    prompts: list[int]
    first_valid: list[int]
    softcap: float = 0.0
    output: torch.Tensor = field(init=False)
    workspace: torch.Tensor = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.output = torch.full_like(self.query, math.nan)
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cuda")
        self._lengths = torch.empty((3, len(self.ends)), dtype=torch.int32, device="cuda")
        self.total = max(self.ends)
        self.write_lengths()

    def write_lengths(self) -> None:
        """To the device, where a captured graph finds them."""
        integers = [[end - 1 for end in self.ends], self.prompts, self.first_valid]
        self._lengths.copy_(torch.tensor(integers, dtype=torch.int32))

    def new_problem(self) -> Problem:
        """With what is the operator's own."""
        p = Problem()
        p.sink, p.window, p.last = self.pattern.as_attributes().values()
        return p

    def problem(self) -> Problem:
        """What the library is given."""
        B, S, H, D = self.query.shape
        G, T = self.cache[0].shape[1:3]
        p = self.new_problem()
        p.dtype, p.scale, p.softcap = DTYPES[self.query.dtype], D**-0.5, self.softcap
        p.batch, p.query_length, p.num_heads, p.kv_num_heads = B, S, H, G
        p.head_size = p.value_head_size = D
        p.past_capacity = p.present_capacity = T
        p.total = self.total
        p.query_stride, p.key_stride, p.value_stride = H * D, G * D, G * D
        p.query, p.key, p.value, p.output = (
            t.data_ptr() for t in (self.query, self.key, self.value, self.output)
        )
        p.past_key, p.past_value = p.present_key, p.present_value = [
            t.data_ptr() for t in self.cache
        ]
        p.seqlens_k, p.prompt_length, p.first_valid = (row.data_ptr() for row in self._lengths)
        return p

    def expected(self) -> torch.Tensor:
        """The output by the definition, in float64; the cache has to hold the new tokens."""
        B, S, H, D = self.query.shape
        j = np.arange(self.cache[0].shape[2])[None, :]
        result = torch.zeros(self.query.shape, dtype=torch.float64, device="cuda")
        for b in range(B):
            end, first = self.ends[b], self.first_valid[b]
            i = max(0, end - S) + np.arange(S)[:, None]
            exists = (j < end) & (i < end)
            mask = keep(i, j, self.pattern, self.prompts[b], first) & exists
            kept = torch.from_numpy(mask).to("cuda")
            k, v = (t[b].double().repeat_interleave(H // t.shape[1], 0) for t in self.cache)
            v = v.nan_to_num()  # slots that hold no key
            scores = torch.einsum("shd,htd->hst", self.query[b].double(), k) * D**-0.5
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            weights = scores.masked_fill(~kept, -math.inf).softmax(-1).nan_to_num()
            result[b] = torch.einsum("hst,htd->shd", weights, v)
        return result


def random_call(pick: random.Random, dtype: torch.dtype, D: int) -> Call:
    """Any pattern and lengths; slots outside a row's keys hold NaN."""
    G, group, B = pick.choice([1, 2, 4]), pick.choice([1, 2, 3, 4, 7]), pick.choice([1, 1, 2, 3])
    S = pick.choice([1, 1, 3, 8, 33, 128, 500, 1100, 1900])
    T = S + pick.choice([0, 0, 5, 300, 2500])
    ends = [T if pick.random() < 0.5 else pick.randint(min(S, 1), T) for _ in range(B)]
    first = [pick.choice([0, 0, pick.randint(0, end)]) for end in ends]
    prompts = [end + pick.choice([0, 0, 700, -200, -3000]) for end in ends]
    pattern = TrianglePattern(
        pick.choice([0, 1, 8, 16, 17, 150]), pick.choice([1, 31, 512, 700, -1]),
        pick.choice([1, 16, 128, 900]),
    )  # fmt: skip
    query = torch.randn(B, S, G * group, D, device="cuda").to(dtype)
    cache = tuple(torch.randn(B, G, T, D, device="cuda").to(dtype) for _ in range(2))
    fresh = tuple(torch.randn(B, S, G, D, device="cuda").to(dtype) for _ in range(2))
    for old, new in zip(cache, fresh, strict=True):
        for b in range(B):
            old[b, :, : first[b]] = old[b, :, ends[b] :] = math.nan
            new[b, : max(0, first[b] - max(0, ends[b] - S))] = math.nan
    softcap = pick.choice([0.0, 0.0, 0.0, 15.0])
    return Call(pattern, query, *fresh, (cache[0], cache[1]), ends, prompts, first, softcap)


def check(library: Library, count: int, seed: int) -> None:
    """Compares `count` random calls of each head size with float64.

    Raises:
        SystemExit: one is further off than rounding explains; says which.
    """
    for D in (64, 96, 128, 256, 80):
        worst = dict[torch.dtype, float]()
        for number in range(count):
            pick = random.Random(f"{seed} {D} {number}")
            torch.manual_seed(pick.getrandbits(32))
            dtype = pick.choice([torch.bfloat16, torch.float16])
            call = random_call(pick, dtype, D)
            library.run(call)
            expected = call.expected()
            off = float((call.output.double() - expected).abs().max())
            largest = float(expected.abs().max())
            if not off <= TOLERANCES[str(dtype).removeprefix("torch.")] * largest:
                raise SystemExit(
                    f"{library.name}: call {number} of head size {D} is off by {off} of {largest}: "
                    f"{dtype} {tuple(call.query.shape)} {tuple(call.cache[0].shape)} "
                    f"{call.pattern} ends {call.ends} prompts {call.prompts} "
                    f"first {call.first_valid} softcap {call.softcap}"
                )
            worst[dtype] = max(worst.get(dtype, 0.0), off / (largest or 1.0))
        shares = {str(dtype): f"{share:.1e}" for dtype, share in worst.items()}
        print(f"{library.name}: head size {D}: {count} calls right, largest errors {shares}")


def timed_call(new: int, keys: int, dense: bool) -> Call:
    """B=1, H=32, G=8, D=128, bfloat16, unit-normal."""
    pattern = DENSE_PATTERN if dense else TrianglePattern()
    query, *fresh = (torch.randn(1, new, n, 128, device="cuda").bfloat16() for n in (32, 8, 8))
    cache = tuple(torch.randn(1, 8, keys, 128, device="cuda").bfloat16() for _ in range(2))
    return Call(pattern, query, *fresh, (cache[0], cache[1]), [keys], [keys], [0])


def chained_time(library: Library, call: Call, calls: int = 10) -> float:
    """Milliseconds of a call in a captured graph of `calls`."""
    graph = torch.cuda.CUDAGraph()
    library.run(call)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            library.run(call)
    return event_time(graph.replay, 3) / calls


def measure(library: Library, call: Call) -> tuple[float, ...]:
    """Milliseconds of attention, append and a chained call."""
    kernels = kernel_times(lambda: library.run(call), 5)
    append = sum(time for kernel, time in kernels.items() if APPEND in kernel)
    return sum(kernels.values()) - append, append, chained_time(library, call)


def compare(libraries: list[Library], name: str, rounds: int) -> None:
    """Prints one line a build: medians over the rounds."""
    call = timed_call(*TIMED[name])
    times: dict[str, list[tuple[float, ...]]] = {library.name: [] for library in libraries}
    for number in range(rounds):
        for library in libraries if number % 2 == 0 else libraries[::-1]:
            times[library.name].append(measure(library, call))
    medians = {
        library: [statistics.median(column) for column in zip(*rows, strict=True)]
        for library, rows in times.items()
    }
    first = medians[libraries[0].name][0]
    for library, (attention, append, chained) in medians.items():
        print(
            f"{name:16} {attention:9.4f} {append:8.4f} {chained:9.4f} {attention / first:6.3f}  "
            f"{library}"
        )


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="+", type=Path, help="the first is the yardstick")
    parser.add_argument("--calls", type=int, default=40, help="random calls for each head size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--shapes", default=",".join(TIMED), help="names of the shapes to time")
    o = parser.parse_args()
    print(json.dumps(describe_run(["torch"])))
    libraries = [Library(path) for path in o.libraries]
    for library in libraries:
        check(library, o.calls, o.seed)
    print(f"{'':16} {'attention':>9} {'append':>8} {'chained':>9} {'share':>6}")
    for name in filter(None, o.shapes.split(",")):
        compare(libraries, name, o.rounds)


if __name__ == "__main__":
    main()
