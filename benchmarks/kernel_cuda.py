"""How fast is the CUDA kernel beside everything else that could run it? One GPU, one table.

    python -m benchmarks.kernel_cuda --lengths 256,1024,8192,32768,131072

Ours runs as an operator of ONNX Runtime's CUDA provider with a shared cache; beside it torch's SDPA
(flash, cuDNN), ONNX Runtime's GroupQueryAttention (dense and windowed), compiled flex_attention and
a plain Triton kernel. Times are device times of all kernels of a call, medians; appending to the
cache is listed apart. The floor is the kept pairs' operations at the measured matrix rate.
`com.microsoft::SparseAttention` is left out: its layout is in blocks and per head, the same for
every length, and can say neither a window of tokens nor dense last rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch  # before onnxruntime: it brings the CUDA libraries
import torch.nn.functional as F  # noqa: N812
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, OP_TYPE, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep, kept_pairs

from benchmarks.device_time import Run, event_time, kernel_times
from benchmarks.machine import describe_run

APPEND: Final = "append_kernel"
ELEMENTS: Final = {torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}


@dataclass(frozen=True)
class Inputs:
    """Queries `[1, S, H*D]`, new keys and values `[1, S, G*D]`, cache `[1, G, N, D]`."""

    length: int
    new: int
    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """Median milliseconds on the device: attention, cache append, and a call of a chain."""

    length: int
    new: int
    name: str
    attention: float
    append: float
    chained: float
    error: float | None = None


def make_inputs(length: int, new: int, dtype: torch.dtype) -> Inputs:
    """Unit-normal; the cache holds the past, and the new tokens already."""
    H, G, D = 32, 8, 128
    torch.manual_seed(length + new)
    cache = tuple(torch.randn(1, G, length, D, device="cuda").to(dtype) for _ in range(2))
    fresh = [c[:, :, length - new :].transpose(1, 2).reshape(1, new, G * D) for c in cache]
    query = torch.randn(1, new, H * D, device="cuda").to(dtype)
    tensors = [t.contiguous() for t in fresh]
    return Inputs(length, new, H, G, D, dtype, query, tensors[0], tensors[1], (cache[0], cache[1]))


class Operator:
    """Attention nodes on the CUDA provider, each one's output the next one's query.

    Their cache lies in one pair of shared buffers. Several nodes run as a captured graph.
    """

    def __init__(
        self, op_type: str, domain: str, attributes: dict[str, Any], x: Inputs, count: int = 1
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        provider = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
        if count > 1:
            provider["enable_cuda_graph"] = "1"
        self.session = ort.InferenceSession(
            _nodes(op_type, domain, attributes, x, count),
            options,
            providers=[("CUDAExecutionProvider", provider)],
        )
        self.chained = ort.RunOptions()  # calls follow each other on the stream without a wait
        self.chained.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bind(x)

    def bind(self, x: Inputs) -> None:
        """Takes other inputs from now on, of any length."""
        self.tensors = _tensors(x)
        self.output = torch.full_like(x.query, float("nan"))
        self.binding = self.session.io_binding()
        for name, tensor in self.tensors.items():
            self.binding.bind_input(name, *_bound(tensor))
        for output in self.session.get_outputs():
            name, _, _ = output.name.rpartition("_")
            tensor = {"present_key": x.cache[0], "present_value": x.cache[1]}.get(name, self.output)
            self.binding.bind_output(output.name, *_bound(tensor))

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding, self.chained)


def _tensors(x: Inputs) -> dict[str, torch.Tensor]:
    """By input name, in the node's order; the past is the cache in place."""
    return {
        "query": x.query,
        "key": x.key,
        "value": x.value,
        "past_key": x.cache[0],
        "past_value": x.cache[1],
        "seqlens_k": torch.full((1,), x.length - 1, dtype=torch.int32, device="cuda"),
        "total_sequence_length": torch.tensor([x.length], dtype=torch.int32),
    }


def _nodes(op_type: str, domain: str, attributes: dict[str, Any], x: Inputs, count: int) -> bytes:
    element, tensors = ELEMENTS[x.dtype], _tensors(x)
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT32 if tensor.dtype == torch.int32 else element,
            [size if size in (1, x.kv_heads, x.size) else f"{name}_{axis}"
             for axis, size in enumerate(tensor.shape)],
        )
        for name, tensor in tensors.items()
    ]  # fmt: skip
    names = [[f"{name}_{number}" for name in contract.OUTPUTS] for number in range(count)]
    found = [names[-1][0], *(name for row in names for name in row[1:])]
    outputs = [helper.make_tensor_value_info(name, element, None) for name in found]
    nodes = [
        helper.make_node(
            op_type, [query, *list(tensors)[1:]], row, domain=domain,
            num_heads=x.heads, kv_num_heads=x.kv_heads, **attributes,
        )
        for query, row in zip(["query", *(row[0] for row in names)], names, strict=False)
    ]  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _bound(tensor: torch.Tensor) -> tuple[Any, ...]:
    element = np.int32 if tensor.dtype == torch.int32 else ELEMENTS[tensor.dtype]
    return tensor.device.type, 0, element, tuple(tensor.shape), tensor.data_ptr()


def triangle(x: Inputs, pattern: TrianglePattern) -> Operator:
    """Our operator."""
    return Operator(OP_TYPE, contract.DOMAIN, pattern.as_attributes(), x)


def contenders(x: Inputs, pattern: TrianglePattern) -> dict[str, Callable[[], Run]]:
    """What runs beside ours, by name; each entry makes its run."""
    gqa = ("GroupQueryAttention", "com.microsoft")
    found: dict[str, Callable[[], Run]] = {
        "GroupQueryAttention": lambda: Operator(*gqa, {}, x),
        "ours, dense mode": lambda: triangle(x, DENSE_PATTERN),
    }
    if x.new < x.length:
        return found
    window = {"local_window_size": pattern.sliding_window_size}
    found["GroupQueryAttention, window only"] = lambda: Operator(*gqa, window, x)
    q = x.query.view(1, x.new, x.heads, x.size)
    found["plain Triton"] = lambda: _plain_triton(q, x, pattern)
    found["flex_attention"] = lambda: _flex(q, x, pattern)
    for name, backend in (
        ("SDPA as torch chooses", None),
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        found[name] = lambda backend=backend: _sdpa(q, x, backend)
    return found


def _plain_triton(q: torch.Tensor, x: Inputs, pattern: TrianglePattern) -> Run:
    from benchmarks.plain_triton import triangle_attention

    sink, window, last = pattern.as_attributes().values()
    return lambda: triangle_attention(q, *x.cache, (sink, window, last))


def _sdpa(q: torch.Tensor, x: Inputs, backend: SDPBackend | None) -> Run:
    def run() -> object:
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(
                q.transpose(1, 2), *x.cache, is_causal=True, enable_gqa=True
            )

    return run


def _flex(q: torch.Tensor, x: Inputs, pattern: TrianglePattern) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sink, window, last = pattern.as_attributes().values()

    def kept(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((j < sink) | (i - j < window) | (i >= x.length - last))

    blocks = torch.compile(create_block_mask)(kept, None, None, x.new, x.length, device="cuda")
    compiled = torch.compile(flex_attention)
    rows = q.transpose(1, 2)
    return lambda: compiled(rows, *x.cache, block_mask=blocks, enable_gqa=True)


def reference_error(x: Inputs, output: torch.Tensor, pattern: TrianglePattern) -> float:
    """`|out - ref| / |ref|` over 48 rows, the same for all, against float64 on the same inputs."""
    random = torch.randint(0, x.new, (32,), generator=torch.Generator().manual_seed(x.length))
    rows = torch.cat([random, torch.arange(max(0, x.new - 16), x.new)])
    position = rows + x.length - x.new
    mask = torch.from_numpy(
        keep(position.numpy()[:, None], np.arange(x.length), pattern, x.length)
    ).cuda()
    q = x.query.view(x.new, x.heads, x.size)[rows.cuda()].double()
    k, v = (c[0].double().repeat_interleave(x.heads // x.kv_heads, 0) for c in x.cache)
    scores = torch.einsum("rhd,hnd->hrn", q, k) * x.size**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = torch.einsum("hrn,hnd->rhd", weights, v).reshape(len(rows), -1)
    actual = output.reshape(x.new, -1)[rows.cuda()].double()
    return float((actual - expected).norm() / expected.norm())


def time_run(x: Inputs, name: str, run: Run, error: float | None) -> Row:
    """Times one contender at one shape."""
    repeats = 10 if x.length * x.new > 2**31 else 30
    if name not in ("ours",) and x.new > 30000 and x.length > 30000:
        repeats = 5
    kernels = kernel_times(run, repeats)
    append = sum(time for kernel, time in kernels.items() if APPEND in kernel)
    row = Row(
        x.length, x.new, name, sum(kernels.values()) - append, append,
        event_time(run, repeats), error,
    )  # fmt: skip
    note = "" if error is None else f"  error {error:.2e}"
    print(f"{x.length:>7} {x.new:>7} {name:34} {row.attention:9.4f} {append:8.4f} "
          f"{row.chained:9.4f}{note}", flush=True)  # fmt: skip
    return row


def matrix_rate() -> float:
    """Operations a second of a large bf16 product of random matrices."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / (event_time(lambda: a @ b, 20) / 1e3)


def first_calls(lengths: tuple[int, ...], pattern: TrianglePattern) -> dict[int, dict[str, float]]:
    """Milliseconds of each length's first call, in a session that has run another, and later."""
    run = triangle(make_inputs(1000, 1000, torch.bfloat16), pattern)
    run()
    result = {}
    for length in lengths:
        run.bind(make_inputs(length, length, torch.bfloat16))
        times = [_single_call(run) for _ in range(12)]
        result[length] = {"first": times[0], "steady": statistics.median(times[2:])}
    return result


def _single_call(run: Run) -> float:
    """Milliseconds from an idle device to the end of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def decode_chains(lengths: tuple[int, ...], count: int = 64) -> dict[str, dict[int, float]]:
    """Microseconds a node of captured chains of decode steps, the append included, by length."""
    kinds = {
        "ours": (OP_TYPE, contract.DOMAIN, TrianglePattern().as_attributes()),
        "GroupQueryAttention": ("GroupQueryAttention", "com.microsoft", dict[str, Any]()),
    }
    result: dict[str, dict[int, float]] = {name: {} for name in kinds}
    for length in lengths:
        x = make_inputs(length, 1, torch.bfloat16)
        chains = {name: Operator(*kind, x, count) for name, kind in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(5):
            for name, chain in chains.items():
                times[name].append(event_time(chain, 20) / count * 1e3)
        for name, found in times.items():
            result[name][length] = round(statistics.median(found), 2)
    return result


def measure(length: int, new: int, rate: float, skip: set[str]) -> list[Row]:
    """All contenders at one shape, ours first."""
    pattern, dtype = TrianglePattern(), torch.bfloat16
    x = make_inputs(length, new, dtype)
    ours = triangle(x, pattern)
    ours()
    torch.cuda.synchronize()
    rows = [time_run(x, "ours", ours, reference_error(x, ours.output, pattern))]
    if new == length:
        floor = kept_pairs(length, pattern) * 4 * x.size * x.heads / rate * 1e3
        rows.append(Row(length, new, "floor (kept pairs at the matrix rate)", floor, 0.0, floor))
        print(f"{length:>7} {new:>7} {'floor':34} {floor:9.4f}")
    for name, make in contenders(x, pattern).items():
        if name in skip:
            continue
        try:
            run = make()
            error = None
            if name.startswith("SDPA"):
                output = run().transpose(1, 2)  # type: ignore[attr-defined]
                error = reference_error(x, output, DENSE_PATTERN)
            rows.append(time_run(x, name, run, error))
        except Exception as trouble:  # a contender that cannot run must not end the comparison
            print(f"{length:>7} {new:>7} {name:34} failed: {str(trouble)[:90]}")
    return rows


def main() -> None:
    """Measures prompts and decode steps, prints as it goes, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="256,512,1024,8192,16384,32768,65536,131072")
    parser.add_argument("--decode", default="2048,32768,131072")
    parser.add_argument("--skip", default="", help="contenders to leave out, comma-separated")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernel_cuda.json"))
    o = parser.parse_args()
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    torch.cuda.set_stream(torch.cuda.Stream())
    run = describe_run(["onnxruntime", "torch"])
    rate = matrix_rate()
    skip = set(filter(None, o.skip.split(",")))
    print(f"matrix rate {rate / 1e12:.0f} TFLOP/s; milliseconds on the device, medians")
    print(f"{'keys':>7} {'new':>7} {'':34} {'attention':>9} {'append':>8} {'chained':>9}")
    rows: list[Row] = []
    shapes = [(n, n) for n in map(int, o.lengths.split(","))]
    shapes += [(n, 1) for n in map(int, filter(None, o.decode.split(",")))]
    for length, new in shapes:
        rows += measure(length, new, rate, skip)
        content = {
            "run": run,
            "shape": "B=1 H=32 G=8 D=128 bfloat16, sinks 8, window 512, last 128",
            "matrix_rate": rate,
            "milliseconds": [asdict(row) for row in rows],
        }
        o.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    content["decode_chain_us"] = decode_chains((2048, 8192, 32768))
    print("decode step in a captured chain, us:", content["decode_chain_us"])
    content["first_call_ms"] = first_calls((2000, 5000, 50000, 30000), TrianglePattern())
    print("first call of a new length:", content["first_call_ms"])
    o.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
