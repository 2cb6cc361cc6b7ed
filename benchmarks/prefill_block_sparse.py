"""Time to first token of a Llama-3.1-8B-shaped graph whose dense layers are block-sparse ones.

    python -m benchmarks.prefill_block_sparse --folder build/llama8b

Beside the graphs of `benchmarks.prefill_cuda` (dense, and with layers 16-31 as triangle layers for
hopper) one for each length and density asked for, whose layers 0-15 are block-sparse too. Random
weights have no structure, so `mass` is set for the density: a graph with `block_mask` outputs tells
it, and the mass is moved until the mean over the layers is within .005. One model at a time is on
the GPU; the order turns round after each round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import torch  # before onnxruntime: it brings the CUDA libraries
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE, OUTPUTS

from benchmarks.device_time import kernel_times
from benchmarks.llama_graph import LlamaShape
from benchmarks.machine import describe_run
from benchmarks.prefill_cuda import Model, Settings, kinds, prepare, timed_run

PROBE: Final = "probe.onnx"
NEAR: Final = 0.005
# Where the search begins: what gives the density on unit-normal queries and keys.
FIRST_MASS: Final = {(8192, 0.15): 0.02, (32768, 0.15): 0.125, (65536, 0.15): 0.142}
TRIES: Final = 5


@dataclass(frozen=True)
class Wanted:
    """A length (tokens), the density its block-sparse layers are to have, and how to get it."""

    length: int
    density: float

    @property
    def name(self) -> str:
        return f"block-sparse {self.density} at {self.length}"


def main() -> None:
    """Prepares (unless told not to), finds the masses, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/llama8b"))
    parser.add_argument(
        "--cases", default="131072:0.15,131072:0.3,65536:0.15,32768:0.15,8192:0.15",
        help="length:density, ...",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weight-sets", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="of each length, in each round")
    parser.add_argument("--only-run", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/prefill_block_sparse.json")
    )
    o = parser.parse_args()
    cases = [case.split(":") for case in o.cases.split(",")]
    wanted = [Wanted(int(length), float(density)) for length, density in cases]
    lengths = tuple(sorted({case.length for case in wanted}))
    shape = LlamaShape(layers=o.layers, weight_sets=o.weight_sets)
    settings = Settings(o.folder, shape, lengths, 0, 0, o.rounds, o.repeats, o.output)
    if not o.only_run:
        prepare(settings)
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    results: dict[str, Any] = {"run": describe_run(["onnxruntime", "torch"])}
    results["weight_sets"] = shape.weight_sets
    results["masses"] = {case.name: find_mass(settings, case) for case in wanted}
    measure_all(settings, wanted, results)
    print(table(results, wanted))


def export(settings: Settings, case: Wanted, mass: float) -> Path:
    """The folder of the graph at that mass, with a second graph that tells the blocks."""
    from trianglemix.exporter.cli import command

    folder = settings.folder / case.name.replace(" ", "-")
    half = settings.shape.layers // 2
    command.main(
        [
            str(settings.folder / "dense"), "-o", str(folder), "--target", "hopper",
            "--start-layer", str(half), "--block-sparse-layers", f"0-{half - 1}",
            "--mass", f"{mass:.6f}", "--weights", "link", "--quiet", "--force",
        ],
        standalone_mode=False,
    )  # fmt: skip
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for number, node in enumerate(node for node in model.graph.node if node.op_type == OP_TYPE):
        name = f"block_mask.{number}"
        node.output.extend([""] * (len(OUTPUTS) - 1 - len(node.output)) + [name])
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
        model.graph.output.append(value)
    onnx.save(model, folder / PROBE)
    return folder


def find_mass(settings: Settings, case: Wanted) -> dict[str, float]:
    """Mass and density; the folder of the last export is that of the mass.

    Raises:
        SystemExit: no mass within the tries gives the density.
    """
    mass = FIRST_MASS.get((case.length, case.density), case.density)
    for _ in range(TRIES):
        folder = export(settings, case, mass)
        density = probe(settings, folder, case.length)
        print(f"{case.name}: mass {mass:.4f} gives {density:.4f}", flush=True)
        if abs(density - case.density) <= NEAR:
            return {"mass": mass, "density": density}
        mass = min(max(mass + case.density - density, mass / 4), 1.0)
    raise SystemExit(f"no mass gives density {case.density} at {case.length} tokens")


def probe(settings: Settings, folder: Path, length: int) -> float:
    """Kept share of causal (tile, block) pairs, the mean over all block-sparse layers."""
    with open_model(folder / PROBE, settings) as model:
        model.allocate_cache(length)
        masks = [
            output.name
            for output in model.session.get_outputs()
            if output.name.startswith("block_mask")
        ]
        tiles = -(-length // 128)
        shape = (1, settings.shape.heads, tiles, tiles)
        buffers = {name: torch.zeros(shape, dtype=torch.uint8, device="cuda") for name in masks}
        model.bind(length, length, buffers)()
        kept = [float(mask.float().sum()) for mask in buffers.values()]
        return statistics.mean(kept) / (settings.shape.heads * tiles * (tiles + 1) / 2)


class open_model:  # noqa: N801 (a context, used as a function)
    """A model, and its memory free again behind it."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._model: Model | None = Model(path, settings.shape)

    def __enter__(self) -> Model:
        assert self._model is not None
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model = None
        gc.collect()
        torch.cuda.empty_cache()


def graphs(settings: Settings, wanted: list[Wanted]) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    """Name, folder and lengths of each contender."""
    for name in ("dense", "hopper"):
        yield name, settings.folder / name, settings.lengths
    for case in wanted:
        yield case.name, settings.folder / case.name.replace(" ", "-"), (case.length,)


def measure_all(settings: Settings, wanted: list[Wanted], results: dict[str, Any]) -> None:
    """Adds every graph's times to the results, in rounds, and writes them as they come."""
    contenders = list(graphs(settings, wanted))
    for number in range(settings.rounds):
        for name, folder, lengths in contenders if number % 2 == 0 else contenders[::-1]:
            result = results.setdefault(name, {"times_s": {}, "first_token_s": {}, "kinds_ms": {}})
            with open_model(folder / "model.onnx", settings) as model:
                for length in lengths:
                    measure(settings, model, length, result)
            print(name, result["first_token_s"], flush=True)
            settings.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(settings: Settings, model: Model, length: int, result: dict[str, Any]) -> None:
    """Adds times to first token (s) and, the first time, kinds of work."""
    model.allocate_cache(length)
    run = model.bind(length, length)
    timed_run(run)
    times = result["times_s"].setdefault(length, [])
    times += [timed_run(run) for _ in range(settings.repeats)]
    result["first_token_s"][length] = statistics.median(times)
    if length not in result["kinds_ms"]:
        result["kinds_ms"][length] = kinds(kernel_times(run, 1, 0))


def table(results: dict[str, Any], wanted: list[Wanted]) -> str:
    """One row a case: seconds and shares of dense."""
    lines = [f"{'tokens':>8} {'density':>8} {'dense s':>9} {'triangle':>9} {'share':>6} "
             f"{'with blocks':>12} {'share':>6}"]  # fmt: skip
    for case in wanted:
        dense, triangle, blocks = (
            results[name]["first_token_s"][case.length] for name in ("dense", "hopper", case.name)
        )
        lines.append(
            f"{case.length:>8} {results['masses'][case.name]['density']:>8.3f} {dense:>9.3f} "
            f"{triangle:>9.3f} {triangle / dense:>6.3f} {blocks:>12.3f} {blocks / dense:>6.3f}"
        )
        lines.append(f"         {results[case.name]['kinds_ms'][case.length]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
