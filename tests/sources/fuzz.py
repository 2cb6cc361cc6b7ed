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
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_patterns

from tests.sources.cell import SilentObserver
from tests.sources.mutate import mutate
from tests.tiny_models import tiny_model

Array = NDArray[Any]
_TOLERANCE: Final = 2e-4
_TINY: Final = (("llama", "dynamo-sdpa-20"), ("llama", "torchscript-18"), ("qwen3", "gqa"))
_CALLS: Final = (13, 5, 1)


class Outcome(Enum):
    """What came of a mutated model."""

    REFUSED = "refused"
    SAME = "exported, same numbers"
    SOURCE_BROKEN = "exported, but the source does not run"
    WRONG = "WRONG NUMBERS"
    CRASHED = "CRASH"


@dataclass(frozen=True)
class Trial:
    """One mutated model."""

    seed: int
    base: str
    mutation: str
    outcome: Outcome
    detail: str


def run_trial(seed: int) -> Trial:
    """Mutates one of the base models by the seed, exports it and compares."""
    random = np.random.default_rng(seed)
    name, data = _bases()[seed % len(_bases())]
    model = ir.from_proto(_parsed(data))
    with tempfile.TemporaryDirectory() as place:
        source, output = Path(place) / "source.onnx", Path(place) / "out"
        mutation = "nothing"
        try:
            mutation = mutate(model, random)
            ir.save(model, source)
        except Exception as error:  # a model that cannot even be written is nobody's input
            return Trial(seed, name, mutation, Outcome.REFUSED, f"not written: {error}")
        outcome, detail = _export_and_compare(source, output)
    return Trial(seed, name, mutation, outcome, detail)


def _export_and_compare(source: Path, output: Path) -> tuple[Outcome, str]:
    keep_all = PatternRequest(0, -1, 1)
    options = ExportOptions(source, output, pattern=keep_all, layers=LayerRequest(start_layer=0))
    try:
        export(options, SilentObserver())
    except TriangleMixError as error:
        return Outcome.REFUSED, str(error)
    except Exception as error:
        return Outcome.CRASHED, f"{type(error).__name__}: {error}"
    return compare_models(source, output / "model.onnx")


def compare_models(source: Path, exported: Path) -> tuple[Outcome, str]:
    """Runs both on a text in three calls, one row of a batch padded, and compares all outputs."""
    try:
        theirs = _Session(source)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        return Outcome.SOURCE_BROKEN, str(error)[:200]
    try:
        ours = _Session(exported)
    except Exception as error:
        return Outcome.CRASHED, f"the export does not open: {str(error)[:200]}"
    worst, ran = 0.0, False
    for batch, pads in ((1, 0), (2, 3)):
        try:
            wanted = theirs.run(batch, pads)
        except Exception:  # this batch is not for this model
            continue
        if not all(np.isfinite(_real(array, pads)).all() for array in wanted):
            continue  # a NaN that the mask hides from attention poisons a decomposed one
        ran = True
        if pads and ours.refuses_padding:
            continue
        try:
            got = ours.run(batch, pads)
        except Exception as error:
            return Outcome.WRONG, f"the source runs, the export does not: {str(error)[:200]}"
        worst = max(worst, _difference(got, wanted, pads))
    if not ran:
        return Outcome.SOURCE_BROKEN, "no call of the source runs and gives finite numbers"
    if worst > _TOLERANCE:
        return Outcome.WRONG, f"numbers differ by {worst:.1e} of the largest"
    return Outcome.SAME, f"{worst:.1e}"


def _difference(ours: list[Array], theirs: list[Array], pads: int) -> float:
    """Largest difference over what real tokens gave, as a share of the largest number."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not np.isfinite(_real(a, pads)).all():
            return float("inf")
        error = np.abs(_real(a, pads) - _real(b, pads)).max(initial=0.0)
        worst = max(worst, float(error / max(1e-6, np.abs(_real(b, pads)).max(initial=0.0))))
    return worst


def _real(array: Array, pads: int) -> Array:
    """The array with what the last row's pads gave set to 0: axis 1 of logits, 2 of caches."""
    if not pads:
        return array
    array = array.copy()
    array[(-1, slice(0, pads)) if array.ndim == 3 else (-1, slice(None), slice(0, pads))] = 0
    return array


class _Session:
    """A session of a source or an export, run by the roles that the names tell."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library_path()))
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = self._session.get_inputs()
        names = [value.name for value in self._inputs]
        self.refuses_padding = not any("position" in name for name in names)

    def run(self, batch: int, pads: int) -> list[Array]:
        """All outputs of a text in three calls, the calls' outputs one after another."""
        random = np.random.default_rng(5)
        ids = random.integers(0, 60, (batch, sum(_CALLS)))
        mask = np.ones_like(ids)
        mask[-1, :pads] = 0
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        caches: list[Array] | None = None
        results: list[Array] = []
        start = 0
        for size in _CALLS:
            end = start + size
            call = {"ids": ids[:, start:end], "mask": mask[:, :end]}
            call["position"] = positions[:, start:end]
            outputs = self._session.run(None, self._feeds(call, caches, batch))
            results += outputs
            caches = [output for output in outputs if output.ndim == 4]
            start = end
        return results

    def _feeds(
        self, call: dict[str, Array], caches: list[Array] | None, batch: int
    ) -> dict[str, Array]:
        feeds, used = {}, 0
        for value in self._inputs:
            kind = value.type.removeprefix("tensor(").removesuffix(")")
            dtype = {"float": "float32", "bool": "bool"}.get(kind, kind)
            role = next((part for part in call if part in value.name), None)
            if role is not None:
                array = call[role]
            elif caches is None:
                sizes = [size if isinstance(size, int) else 0 for size in value.shape]
                array = np.zeros([batch, sizes[1] or 2, 0, sizes[3] or 16])
            else:
                array, used = caches[used], used + 1
            feeds[value.name] = array.astype(dtype)
        return feeds


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
        bad = trial.outcome in (Outcome.WRONG, Outcome.CRASHED)
        if bad or arguments.all:
            print(f"{seed} {trial.base}: {trial.outcome.value}: {trial.mutation}: {trial.detail}")
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return int(any(counts[outcome.value] for outcome in (Outcome.WRONG, Outcome.CRASHED)))


if __name__ == "__main__":
    sys.exit(main())
