"""Exports mutated models: each must be refused cleanly, or keep the numbers of its source.

python -m tests.sources.fuzz --count 300
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_patterns

from tests.sources.cell import SilentObserver
from tests.sources.comparison import Feeding, Outcome, compare_models, runs
from tests.sources.mutate import mutate
from tests.tiny_models import tiny_model

_TINY: Final = (("llama", "dynamo-sdpa-20"), ("llama", "torchscript-18"), ("qwen3", "gqa"))


@dataclass(frozen=True)
class Trial:
    """One mutated model."""

    seed: int
    base: str
    mutation: str
    outcome: Outcome
    detail: str


def run_trial(seed: int, *, redraw: bool = True) -> Trial:
    """Mutates one of the base models by the seed, exports it and compares.

    Without its source's numbers an export can only be seen not to crash. With `redraw` three in
    four mutated models that do not run are therefore left aside for another one.
    """
    random = np.random.default_rng(seed)
    name, data = _bases()[seed % len(_bases())]
    with tempfile.TemporaryDirectory() as place:
        source, output = Path(place) / "source.onnx", Path(place) / "out"
        while True:
            model = ir.from_proto(_parsed(data))
            feeding = Feeding.of(model)
            mutation = "nothing"
            try:
                mutation = mutate(model, random)
                ir.save(model, source)
            except Exception as error:  # a model that cannot even be written is nobody's input
                return Trial(seed, name, mutation, Outcome.REFUSED, f"not written: {error}")
            feeding = feeding.after(model)
            if not redraw or runs(source, feeding) or random.random() < 0.25:
                break
        outcome, detail = _export_and_compare(source, output, feeding)
    return Trial(seed, name, mutation, outcome, detail)


def _export_and_compare(source: Path, output: Path, feeding: Feeding) -> tuple[Outcome, str]:
    keep_all = PatternRequest(0, -1, 1)
    options = ExportOptions(source, output, pattern=keep_all, layers=LayerRequest(start_layer=0))
    try:
        export(options, SilentObserver())
    except TriangleMixError as error:
        return Outcome.REFUSED, str(error)
    except Exception as error:
        return Outcome.CRASHED, f"{type(error).__name__}: {error}"
    return compare_models(source, output / "model.onnx", feeding)


@lru_cache(maxsize=1)
def _bases() -> list[tuple[str, bytes]]:
    """Each pattern's example, and tiny models of three routes."""
    bases = [(pattern.name, _bytes(pattern.example().model)) for pattern in all_patterns()]
    for family, route in _TINY:
        with tempfile.TemporaryDirectory() as place:
            # a copy: onnx_ir reads no data file that has hard links, as exports make them
            folder = shutil.copytree(tiny_model(family, route).path.parent, Path(place) / "m")
            bases.append((f"{family} {route}", _bytes(ir.load(folder / "model.onnx"))))
    return bases


def _bytes(model: ir.Model) -> bytes:
    """The model as one proto with its weights inside."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _parsed(data: bytes) -> Any:
    import onnx

    return onnx.load_from_string(data)


def main() -> int:
    """Prints what is wrong and a count of all outcomes; the exit code is 1 if anything is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="print every trial")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(arguments.start, arguments.start + arguments.count):
        trial = run_trial(seed)
        counts[trial.outcome.value] += 1
        told = (Outcome.WRONG, Outcome.CRASHED, Outcome.REFUSED_AT_RUN)
        if trial.outcome in told or arguments.all:
            print(f"{seed} {trial.base}: {trial.outcome.value}: {trial.mutation}: {trial.detail}")
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return int(any(counts[outcome.value] for outcome in (Outcome.WRONG, Outcome.CRASHED)))


if __name__ == "__main__":
    sys.exit(main())
