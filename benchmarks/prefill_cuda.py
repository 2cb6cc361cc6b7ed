"""How long until the first token? A Llama-3.1-8B-shaped graph on one GPU, dense and triangle.

    python -m benchmarks.prefill_cuda --folder build/llama8b

Makes the graph (random weights, last-token logits), exports it with layers 16-31 as triangle
layers for the targets cuda ("triangle") and hopper, and runs all three on ONNX Runtime's CUDA
provider with a shared cache. One model at a time is on the GPU: at 131,072 tokens one alone takes
some 60 GiB. The order turns round after each round. `--only-run` takes the graphs that are in the
folder. A decode step at `--decode-length` is timed in rounds of its own, on an empty cache: its
differences are smaller than what a GPU still hot from prompts adds to whoever comes later.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch  # before onnxruntime: it brings the CUDA libraries
from onnx import TensorProto

from benchmarks.device_time import PeakMemory, kernel_times
from benchmarks.llama_graph import DATA_FILE, LlamaShape, build_llama
from benchmarks.machine import describe_run

GRAPHS: Final = ("dense", "triangle", "hopper")
TARGETS: Final = {"triangle": "cuda", "hopper": "hopper"}
KINDS: Final = {
    "choice of blocks": ("choice_sm90", "choice_sm80", "choice_float32"),
    "attention": ("attention_sm90", "attention_sm80", "attention_float32"),
    "cache append": ("append_kernel", "ConcatNewToPast", "UnpackRoPEAppend"),
    "GroupQueryAttention": ("flash", "fmha", "cudnn_generated", "attention_fwd", "kernel_mha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitKreduce"),
    "rotation": ("Rotary", "rotary"),
}


@dataclass(frozen=True)
class Settings:
    folder: Path
    shape: LlamaShape
    lengths: tuple[int, ...]
    decode_length: int
    decode_rounds: int
    rounds: int
    repeats: int
    output: Path


class Model:
    """One graph with its cache in shared buffers on the device."""

    def __init__(self, path: Path, shape: LlamaShape) -> None:
        import onnxruntime as ort
        from trianglemix.custom_ops.library import library_path

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        # The first shape would else fix the size of every later allocation.
        provider = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        self.session = ort.InferenceSession(
            str(path), options, providers=[("CUDAExecutionProvider", provider)]
        )
        self.shape = shape
        self.cache: dict[str, torch.Tensor] = {}
        self.logits = torch.zeros(1, 1, shape.vocabulary, dtype=torch.float16, device="cuda")

    def allocate_cache(self, capacity: int) -> None:
        """Buffers of `capacity` tokens for each layer's keys and values."""
        self.cache.clear()
        torch.cuda.empty_cache()
        size = (1, self.shape.kv_heads, capacity, self.shape.head_size)
        names = [value.name for value in self.session.get_inputs() if "past_key" in value.name]
        for name in names:
            self.cache[name] = torch.zeros(size, dtype=torch.float16, device="cuda")

    def bind(
        self, total: int, new: int, more: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> Callable[[], object]:
        """A run of `new` tokens at the end of `total`; `more` outputs by name."""
        ids = torch.randint(0, self.shape.vocabulary, (1, new), device="cuda")
        mask = torch.ones(1, total, dtype=torch.int64, device="cuda")
        binding = self.session.io_binding()
        inputs = {"input_ids": ids, "attention_mask": mask, **self.cache}
        for name, tensor in inputs.items():
            binding.bind_input(name, "cuda", 0, _element(tensor), tensor.shape, tensor.data_ptr())
        outputs = {"logits": self.logits, **more}
        for name, tensor in self.cache.items():
            outputs[name.replace("past_key_values", "present")] = tensor
        for name, tensor in outputs.items():
            binding.bind_output(name, "cuda", 0, _element(tensor), tensor.shape, tensor.data_ptr())

        def run(_: object = (ids, mask)) -> object:
            self.session.run_with_iobinding(binding)
            return None

        return run


def _element(tensor: torch.Tensor) -> Any:
    return {torch.int64: np.int64, torch.uint8: np.uint8}.get(tensor.dtype, TensorProto.FLOAT16)


def prepare(settings: Settings) -> None:
    """The dense graph, its weights, and the exports beside it, which link to the weights."""
    from trianglemix.exporter.cli import command

    dense = settings.folder / "dense"
    weights = build_llama(settings.shape, dense)
    weights.write(dense / DATA_FILE)
    first = str(settings.shape.layers // 2)
    arguments = ["--start-layer", first, "--weights", "link", "--quiet", "--force"]
    for name, target in TARGETS.items():
        output = ["-o", str(settings.folder / name), "--target", target]
        command.main([str(dense), *output, *arguments], standalone_mode=False)


def measure_all(settings: Settings, results: dict[str, Any]) -> None:
    """Adds every graph's figures to the results, in rounds, and writes them as they come."""
    rounds = [measure] * settings.rounds + [measure_decode] * settings.decode_rounds
    for number, measures in enumerate(rounds):
        for name in GRAPHS if number % 2 == 0 else reversed(GRAPHS):
            model = Model(settings.folder / name / "model.onnx", settings.shape)
            measures(settings, model, results.setdefault(name, {}))
            print(name, results[name].get("decode_rounds_ms", ""), flush=True)
            del model
            gc.collect()
            torch.cuda.empty_cache()  # room for the next model
            settings.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(settings: Settings, model: Model, result: dict[str, Any]) -> None:
    """Adds a round: times to first token (s) by length, peak memory, kinds of work.

    Kinds are measured in the first round only.
    """
    for length in settings.lengths:
        model.allocate_cache(length)
        run = model.bind(length, length)
        with PeakMemory() as memory:
            first_call = timed_run(run)
            times = [timed_run(run) for _ in range(settings.repeats)]
        result.setdefault("first_call_s", {}).setdefault(length, first_call)
        result.setdefault("peak_bytes", {}).setdefault(length, memory.peak)
        all_times = result.setdefault("times_s", {}).setdefault(length, [])
        all_times += times
        result.setdefault("first_token_s", {})[length] = statistics.median(all_times)
        if length not in result.setdefault("kinds_ms", {}):
            result["kinds_ms"][length] = kinds(kernel_times(run, 1, 0))
        result["logits_norm"] = float(model.logits.float().norm())
        print(length, " ".join(f"{seconds:.3f}" for seconds in times), "s", flush=True)


def measure_decode(settings: Settings, model: Model, result: dict[str, Any]) -> None:
    """Adds a round: milliseconds of a decode step, median of 80."""
    model.allocate_cache(settings.decode_length)
    step = model.bind(settings.decode_length, 1)
    rounds = result.setdefault("decode_rounds_ms", [])
    rounds.append(round(1e3 * statistics.median([timed_run(step) for _ in range(90)][10:]), 3))
    result["decode_ms"] = statistics.median(rounds)
    if "decode_kinds_ms" not in result:
        result["decode_kinds_ms"] = kinds(kernel_times(step, 3))


def timed_run(run: Callable[[], object]) -> float:
    """Seconds of a run, launch to end."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def kinds(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds by kind of work."""
    sums = dict[str, float]()
    for kernel, milliseconds in times.items():
        found = (kind for kind, marks in KINDS.items() if any(mark in kernel for mark in marks))
        kind = next(found, "everything else")
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    return {kind: round(value, 3) for kind, value in sums.items()}


def table(results: dict[str, Any], lengths: tuple[int, ...]) -> str:
    """One row a length: seconds, shares of dense, peak memory of each graph."""
    head = "".join(f"{f'{name} s':>12} {'share':>6}" for name in GRAPHS[1:])
    lines = [f"{'tokens':>8} {'dense s':>9} {head}   peak GiB of each"]
    for length in lengths:
        dense, *others = (results[name]["first_token_s"][length] for name in GRAPHS)
        cells = "".join(f"{seconds:>12.3f} {seconds / dense:>6.3f}" for seconds in others)
        peaks = " ".join(f"{results[name]['peak_bytes'][length] / 2**30:7.1f}" for name in GRAPHS)
        lines.append(f"{length:>8} {dense:>9.3f} {cells} {peaks}")
    if "decode_ms" in results[GRAPHS[0]]:
        steps = ", ".join(f"{name} {results[name]['decode_ms']:.2f}" for name in GRAPHS)
        lines.append(f"decode, ms a token: {steps}")
    for name in GRAPHS if lengths else ():
        lines.append(f"{name} at {lengths[-1]}: {results[name]['kinds_ms'][lengths[-1]]}")
    return "\n".join(lines)


def main() -> None:
    """Prepares (unless told not to), measures the graphs, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/llama8b"))
    parser.add_argument("--lengths", default="8192,32768,65536,131072")
    parser.add_argument("--decode-length", type=int, default=32768)
    parser.add_argument("--decode-rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weight-sets", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="of each length, in each round")
    parser.add_argument("--only-run", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prefill_cuda.json"))
    o = parser.parse_args()
    shape = LlamaShape(layers=o.layers, weight_sets=o.weight_sets)
    lengths = tuple(int(n) for n in filter(None, o.lengths.split(",")))
    settings = Settings(
        o.folder, shape, lengths, o.decode_length, o.decode_rounds, o.rounds, o.repeats, o.output
    )
    if not o.only_run:
        prepare(settings)
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    results: dict[str, Any] = {"run": describe_run(["onnxruntime", "torch"])}
    results["weight_sets"] = shape.weight_sets
    measure_all(settings, results)
    print(table(results, lengths))


if __name__ == "__main__":
    main()
