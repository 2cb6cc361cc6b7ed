"""How fast is the CPU kernel beside ONNX Runtime's and torch's attention? One run, one table.

All contenders of a shape run in turn, round after round, on two threads; the table has medians.
Ours and GroupQueryAttention also append the new tokens to the cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, OP_TYPE, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import kept_pairs

from benchmarks.device_time import Run
from benchmarks.kernel_variants import build_variants, runs_here, visited_pairs
from benchmarks.machine import describe_run, save_result

THREADS: Final = 2
PAUSE: Final = 0.05  # seconds
GQA: Final = "ORT GroupQueryAttention"
MATMUL: Final = "torch matmul, 2048 cubed"
MATMUL_SIZE: Final = 2048


@dataclass(frozen=True)
class Shape:
    """One attention: `new` tokens at the end of `length` keys."""

    name: str
    num_heads: int
    kv_num_heads: int
    head_size: int
    length: int
    new: int
    pattern: TrianglePattern
    dtype: str = "float32"

    @property
    def is_decode(self) -> bool:
        return self.new == 1


@dataclass(frozen=True)
class Timing:
    """Median milliseconds; for our kernels also the pairs they compute and the pairs they keep."""

    shape: str
    contender: str
    median_ms: float
    calls: int
    visited: int | None = None
    kept: int | None = None
    gflops: float | None = None


SMALL: Final = TrianglePattern(4, 512, 64)
SHAPES: Final = (
    Shape("H8 G2 D64, 2K", 8, 2, 64, 2048, 2048, SMALL),
    Shape("H8 G2 D64, 4K", 8, 2, 64, 4096, 4096, SMALL),
    Shape("H8 G2 D64, 8K", 8, 2, 64, 8192, 8192, SMALL),
    Shape("H8 G2 D64, 8K float16", 8, 2, 64, 8192, 8192, SMALL, "float16"),
    Shape("SmolLM2 H9 G3 D64, 8000", 9, 3, 64, 8000, 8000, TrianglePattern(8, 512, 128)),
    Shape("H8 G2 D64, decode at 8K", 8, 2, 64, 8192, 1, SMALL),
    Shape("SmolLM2, decode at 8000", 9, 3, 64, 8000, 1, TrianglePattern(8, 512, 128)),
    Shape("H32 G8 D128, decode at 8K", 32, 8, 128, 8192, 1, SMALL),
)


class Tensors:
    """Unit-normal inputs of a shape, shared by all contenders, and buffers for the outputs."""

    def __init__(self, shape: Shape) -> None:
        random = np.random.default_rng(0)
        h, g, d, s = shape.num_heads, shape.kv_num_heads, shape.head_size, shape.new

        def normal(*size: int) -> Array:
            return random.standard_normal(size, dtype=np.float32).astype(shape.dtype)

        slots = shape.length if shape.is_decode else 0
        self.query = normal(1, s, h * d)
        self.key, self.value = normal(1, s, g * d), normal(1, s, g * d)
        self.past = [normal(1, g, slots, d) for _ in range(2)]
        self.present = self.past if slots else [normal(1, g, shape.length, d) for _ in range(2)]
        self.output = np.empty_like(self.query)

    def bind(self, session: ort.InferenceSession, lengths: dict[str, Array]) -> Run:
        """A call of the session with everything bound; a decode updates its cache in place."""
        arrays = {
            "query": self.query, "key": self.key, "value": self.value,
            "past_key": self.past[0], "past_value": self.past[1], **lengths,
        }  # fmt: skip
        outputs = dict(
            zip(("output", "present_key", "present_value"), [self.output, *self.present])  # noqa: B905
        )
        binding = session.io_binding()
        for value in session.get_inputs():
            array = arrays[value.name]
            binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(array))
        for value in session.get_outputs():
            array = outputs[value.name]
            binding.bind_ortvalue_output(value.name, ort.OrtValue.ortvalue_from_numpy(array))
        return lambda: session.run_with_iobinding(binding)


def open_session(node: onnx.NodeProto, shape: Shape, library: Path | None) -> ort.InferenceSession:
    """A session of one node, whose inputs and outputs are the graph's."""
    element = TensorProto.FLOAT16 if shape.dtype == "float16" else TensorProto.FLOAT
    g, d = shape.kv_num_heads, shape.head_size
    dims: dict[str, list[int | str]] = {
        "query": ["B", "S", shape.num_heads * d],
        "key": ["B", "S", g * d],
        "value": ["B", "S", g * d],
        "past_key": ["B", g, "P", d],
        "past_value": ["B", g, "P", d],
        "seqlens_k": ["B"],
        "total_sequence_length": [1],
    }
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.INT32 if len(dims[name]) == 1 else element, dims[name]
        )
        for name in node.input
    ]
    outputs = [
        helper.make_tensor_value_info(
            name, TensorProto.UINT8 if name == "block_mask" else element, None
        )
        for name in node.output
    ]
    opset = 23 if node.op_type == "Attention" else 17
    opsets = [helper.make_opsetid("", opset)]
    if node.domain:
        opsets.append(helper.make_opsetid(node.domain, 1))
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def ours(shape: Shape, tensors: Tensors, pattern: TrianglePattern, library: Path) -> Run:
    return with_cache((OP_TYPE, contract.DOMAIN), shape, tensors, pattern.as_attributes(), library)


def group_query_attention(shape: Shape, tensors: Tensors) -> Run:
    return with_cache(("GroupQueryAttention", "com.microsoft"), shape, tensors, {}, None)


def with_cache(
    kind: tuple[str, str],
    shape: Shape,
    tensors: Tensors,
    more: Mapping[str, int | float],
    library: Path | None,
) -> Run:
    """A node of that operator and domain, both of which take the same inputs."""
    node = helper.make_node(
        kind[0], list(contract.INPUTS[:7]), list(contract.OUTPUTS), domain=kind[1],
        num_heads=shape.num_heads, kv_num_heads=shape.kv_num_heads, **more,
    )  # fmt: skip
    return tensors.bind(open_session(node, shape, library), lengths_of(shape))


def lengths_of(shape: Shape) -> dict[str, Array]:
    """The lengths of a call, by input name."""
    return {
        "seqlens_k": np.array([shape.length - 1], np.int32),
        "total_sequence_length": np.array([shape.length], np.int32),
    }


def onnx_attention(shape: Shape, tensors: Tensors) -> Run:
    node = helper.make_node(
        "Attention",
        ["query", "key", "value"],
        ["output"],
        is_causal=1,
        q_num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
    )
    return tensors.bind(open_session(node, shape, None), {})


def torch_attention(shape: Shape, tensors: Tensors) -> Run:
    def heads(array: Array, count: int) -> torch.Tensor:
        return torch.from_numpy(array).view(1, -1, count, shape.head_size).transpose(1, 2)

    query = heads(tensors.query, shape.num_heads)
    if shape.is_decode:
        key, value = (torch.from_numpy(array) for array in tensors.present)
    else:
        key, value = (heads(a, shape.kv_num_heads) for a in (tensors.key, tensors.value))
    attend = torch.nn.functional.scaled_dot_product_attention
    causal = not shape.is_decode
    return lambda: attend(query, key, value, is_causal=causal, enable_gqa=True)


def interleave(runs: dict[str, Run], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each run: every round calls each `calls` times, after one round not counted.

    Before each there is a pause, since idle threads of the one before spin for a while, and the
    first of several calls is not counted: its own threads sleep.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(PAUSE)
            for call in range(calls):
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                if number > 0 and (call > 0 or calls == 1):
                    times[name].append(seconds)
    return times


def contenders(shape: Shape, variants: dict[str, Path]) -> dict[str, Run]:
    """Everyone who can compute the shape, by name; ours first, the yardstick last."""
    tensors = Tensors(shape)
    runs = {"ours, triangle": ours(shape, tensors, shape.pattern, library_path())}
    if shape.is_decode:
        runs = {"ours": runs["ours, triangle"]}
    else:
        runs["ours, dense"] = ours(shape, tensors, DENSE_PATTERN, library_path())
    if "avx2" in variants and runs_here("avx2"):
        runs["ours, AVX2" if shape.is_decode else "ours, triangle, AVX2"] = ours(
            shape, tensors, shape.pattern, variants["avx2"]
        )
    runs[GQA] = group_query_attention(shape, tensors)
    if not shape.is_decode and shape.dtype == "float32":
        runs["ORT Attention-23"] = onnx_attention(shape, tensors)
    runs["torch SDPA"] = torch_attention(shape, tensors)
    if not shape.is_decode:
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE) for _ in range(2))
        runs[MATMUL] = lambda: a @ b  # in float32: the yardstick of the tiles
    return runs


def measure(shape: Shape, variants: dict[str, Path], rounds: int) -> list[Timing]:
    """Times all contenders of one shape."""
    calls = 30 if shape.is_decode else 1
    timings = []
    for name, seconds in interleave(contenders(shape, variants), rounds, calls).items():
        median = statistics.median(seconds)
        visited = kept = rate = None
        if name == MATMUL:
            rate = 2 * MATMUL_SIZE**3 / median / 1e9
        elif name.startswith("ours") and not shape.is_decode:
            pattern = DENSE_PATTERN if "dense" in name else shape.pattern
            library = variants["avx2" if "AVX2" in name else best_variant(variants)]
            heads = (shape.num_heads, shape.kv_num_heads)
            visited = visited_pairs(library, heads, shape.length, pattern)
            kept = shape.num_heads * kept_pairs(shape.length, pattern)
            rate = visited * 4 * shape.head_size / median / 1e9
        timings.append(Timing(shape.name, name, median * 1e3, len(seconds), visited, kept, rate))
    return timings


def best_variant(variants: dict[str, Path]) -> str:
    """What the installed library chooses here."""
    return next(
        name for name in ("avx512", "avx2", "plain") if name in variants and runs_here(name)
    )


def print_table(timings: list[Timing]) -> None:
    """GQA is ONNX Runtime's GroupQueryAttention; rates count the pairs visited, masked ones too."""
    table = Table(title=f"CPU attention, {THREADS} threads, medians")
    for column in ("shape", "contender", "ms", "x GQA", "GFLOP/s", "of matmul", "kept/visited"):
        left = column in ("shape", "contender")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    base = {t.shape: t.median_ms for t in timings if t.contender == GQA}
    yardstick = {t.shape: t.gflops for t in timings if t.contender == MATMUL}
    last = ""
    for t in timings:
        if last not in ("", t.shape):
            table.add_section()
        matmul = yardstick.get(t.shape)
        table.add_row(
            "" if t.shape == last else t.shape,
            t.contender,
            f"{t.median_ms:.2f}",
            "" if t.contender == MATMUL else f"{base[t.shape] / t.median_ms:.2f}",
            f"{t.gflops:.0f}" if t.gflops else "",
            f"{t.gflops / matmul:.2f}" if t.gflops and matmul else "",
            f"{t.kept / t.visited:.3f}" if t.kept and t.visited else "",
        )
        last = t.shape
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each shape (default 9)")
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    run = describe_run(["onnxruntime", "torch", "numpy"], THREADS)
    variants = build_variants()
    timings = [timing for shape in SHAPES for timing in measure(shape, variants, rounds)]
    print_table(timings)
    content = {
        "run": run,
        "shapes": [asdict(shape) for shape in SHAPES],
        "timings": [asdict(timing) for timing in timings],
    }
    print(f"written to {save_result('kernel_cpu', content)}")


if __name__ == "__main__":
    main()
