"""How long does an export take? 32-layer graphs of the main sources, and 5 GB of weights.

    python -m benchmarks.export_time        # a table, and benchmarks/results/export_time.json

The graphs are a tiny 32-layer Llama's by real exporters (`source_models.matrix`, minutes, once).
Each export runs in a process of its own, the sources in turn. *Probing* is the time inside the
functions that cut attention out and run it (`exporter/attention/`: `cutout.py`,
`attention_probe.py`, the reference; the import of ONNX Runtime with it), *matching* the rest of the
search.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
from rich.console import Console
from rich.table import Table
from trianglemix.custom_ops import reference
from trianglemix.exporter.attention import attention_probe, cutout
from trianglemix.exporter.attention.sites import Sites
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_patterns

from benchmarks.machine import describe_run, save_result
from source_models.big_model import make_big_model
from source_models.matrix import DEEP_FAMILY, SOURCES, make_sources
from source_models.model_cache import BUILD

ROUTES: Final = (
    "dynamo-sdpa-20", "torchscript-sdpa-18", "dynamo-sdpa-23", "mobius", "genai-fp32-cpu",
)  # fmt: skip
_PROBING: Final = {module.__name__ for module in (cutout, attention_probe, reference)}
_FIND: Final = "find attention"
_CHILD: Final = "--measure-one"


@dataclass(frozen=True)
class Cost:
    """One export as a whole, process start included."""

    wall_seconds: float
    processor_seconds: float
    peak_bytes: int


class _Stopwatch:
    """Seconds spent in the outermost of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - start

        return timed


class _StageClock:
    """An observer that notes when each stage began, and the probing of the search alone."""

    def __init__(self, watch: _Stopwatch) -> None:
        self._marks: list[tuple[str, float]] = []
        self._watch = watch
        self.probing = 0.0
        self.form, self.layers = "", 0

    def stage(self, name: str) -> None:
        self._watch.seconds = 0.0
        self._marks.append((name, time.perf_counter()))

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Sites) -> None:
        self.form, self.layers = sites.found[0].form, len(sites.found)
        self.probing = self._watch.seconds
        self.stage("choose layers")

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, by name; a stage that comes twice is summed."""
        ends = [*(mark for _, mark in self._marks[1:]), time.perf_counter()]
        sums: dict[str, float] = defaultdict(float)
        for (name, start), end in zip(self._marks, ends, strict=True):
            sums[name] += end - start
        return dict(sums)


def measure_stages(source: Path) -> dict[str, Any]:
    """Exports `source` in this process; seconds of each stage, the search told apart."""
    all_patterns()
    watch = _Stopwatch()
    clock = _StageClock(watch)
    modules = [m for name, m in sys.modules.items() if name.startswith("trianglemix.exporter")]
    for module in modules:
        for name, function in list(vars(module).items()):
            if isinstance(function, types.FunctionType) and function.__module__ in _PROBING:
                setattr(module, name, watch.wrap(function))
    with tempfile.TemporaryDirectory() as folder:
        options = ExportOptions(source, Path(folder) / "out", layers=LayerRequest(start_layer=16))
        export(options, clock)
        seconds = clock.seconds()
    seconds |= {"probing": clock.probing, "matching": seconds.pop(_FIND) - clock.probing}
    return {"form": clock.form, "layers": clock.layers, "seconds": seconds}


def measure_process(source: Path, output: Path, *options: str) -> Cost:
    """Runs `trianglemix-export` in a process of its own."""
    program = (
        "import resource, sys; from trianglemix.exporter.cli import command\n"
        "command.main(sys.argv[1:], standalone_mode=False)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "status = open('/proc/self/status').read().split()\n"
        "peak = int(status[status.index('VmHWM:') + 1])\n"  # ru_maxrss counts the parent's, too
        "print(usage.ru_utime + usage.ru_stime, peak * 1024)"
    )
    arguments = [str(source), "-o", str(output), "--layers", "16-31", "--quiet", *options]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - start
    processor, peak = done.stdout.split()[-2:]
    return Cost(wall, float(processor), int(float(peak)))


def _time_graphs(rounds: int) -> list[dict[str, Any]]:
    make_sources([*ROUTES], [DEEP_FAMILY])
    paths = {route: next((SOURCES / route / DEEP_FAMILY).glob("*.onnx")) for route in ROUTES}
    runs: dict[str, list[dict[str, Any]]] = {route: [] for route in ROUTES}
    wholes: dict[str, list[float]] = {route: [] for route in ROUTES}
    for _ in range(rounds):
        for route, path in paths.items():
            command = [sys.executable, "-m", "benchmarks.export_time", _CHILD, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[route].append(json.loads(done.stdout.splitlines()[-1]))
            with tempfile.TemporaryDirectory() as folder:
                wholes[route].append(measure_process(path, Path(folder) / "out").wall_seconds)
    return [
        {
            "route": route,
            "form": runs[route][0]["form"],
            "layers": runs[route][0]["layers"],
            "nodes": len(ir.load(path).graph),
            "seconds": _medians([run["seconds"] for run in runs[route]]),
            "whole_command": statistics.median(wholes[route]),
        }
        for route, path in paths.items()
    ]


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _time_weights(rounds: int) -> dict[str, Any]:
    """5 GB of weights beside their data, and with a copy, beside `cp` of the same file."""
    place = BUILD / "export_time"
    source = place / "big"
    costs: dict[str, list[Cost]] = {"link": [], "copy": []}
    plain: list[float] = []
    try:
        size = make_big_model(source)
        for _ in range(rounds):
            for weights in costs:
                costs[weights].append(_one_big(source, place / "out", weights))
            plain.append(_copy_alone(source / "model.onnx.data", place / "cp"))
    finally:
        shutil.rmtree(place)
    return {
        "bytes": size,
        "linked": asdict(_middle(costs["link"])),
        "copied": asdict(_middle(costs["copy"])),
        "cp_seconds": statistics.median(plain),
    }


def _one_big(source: Path, output: Path, weights: str) -> Cost:
    try:
        return measure_process(source / "model.onnx", output, "--weights", weights)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()


def _copy_alone(source: Path, target: Path) -> float:
    start = time.perf_counter()
    command = ["cp", "--sparse=never", "--reflink=never", str(source), str(target)]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    os.sync()
    return seconds


def _middle(costs: list[Cost]) -> Cost:
    """Median times, and the most memory."""
    return Cost(
        statistics.median(cost.wall_seconds for cost in costs),
        statistics.median(cost.processor_seconds for cost in costs),
        max(cost.peak_bytes for cost in costs),
    )


def _print(graphs: list[dict[str, Any]], weights: dict[str, Any]) -> None:
    table = Table(title="Export of 32 layers, seconds, medians")
    for column in ("source", "form", "nodes", "load", "normalize", "matching", "probing",
                   "rewrite", "save", "whole command"):  # fmt: skip
        left = column in ("source", "form")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for graph in graphs:
        stages = [f"{graph['seconds'][name]:.2f}" for name in
                  ("load", "normalize", "matching", "probing", "rewrite", "save")]  # fmt: skip
        row = [graph["route"], graph["form"], str(graph["nodes"]), *stages]
        table.add_row(*row, f"{graph['whole_command']:.2f}")
    console = Console(width=130)
    console.print(table)
    linked, copied = weights["linked"], weights["copied"]
    console.print(
        f"{weights['bytes'] / 1e9:.1f} GB beside its data: {linked['wall_seconds']:.2f} s "
        f"({linked['processor_seconds']:.2f} s of processor), {linked['peak_bytes'] / 1e6:.0f} MB; "
        f"with a copy {copied['wall_seconds']:.1f} s, {copied['peak_bytes'] / 1e6:.0f} MB "
        f"(cp of the data alone: {weights['cp_seconds']:.1f} s)"
    )


def main() -> None:
    """Times everything and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(_CHILD, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_one is not None:
        print(json.dumps(measure_stages(arguments.measure_one)))
        return
    run = describe_run(["onnxruntime", "onnx_ir", "numpy"], threads=1)
    graphs, weights = _time_graphs(arguments.rounds), _time_weights(arguments.rounds)
    _print(graphs, weights)
    content = {"run": run, "rounds": arguments.rounds, "graphs": graphs, "weights": weights}
    print(save_result("export_time", content))


if __name__ == "__main__":
    main()
