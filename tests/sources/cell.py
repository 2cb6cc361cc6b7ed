"""One cell of the support matrix: a route by a family, exported, run and compared."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.attention.sites import Sites
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import LayerRole
from trianglemix.exporter.options import BlockRequest, ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.manifest.manifest import Manifest

from tests.sources.decoder import Decoder
from tests.sources.expert_nodes import runnable_here
from tests.sources.oracle import Oracle, Text, Triangle

Array = NDArray[Any]
VOCABULARY: Final = 256
PATTERN: Final = TrianglePattern(num_sink_tokens=2, sliding_window_size=6, num_last_tokens=4)
_KEEP_ALL: Final = PatternRequest(0, -1, 1)
_TOLERANCE: Final = {"float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest error, as a share of the largest logit."""
_TWIN: Final = "compared with the source's twin, which the CPU provider runs"
_EXPERTS: Final = "MoE nodes, which the CPU provider lacks, in standard operators on both sides"
_SOURCE_TOLERANCE: Final = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 2e-1}
"""How far a source may be from its family's float64 model and still count as right."""


class Status(Enum):
    """What came of a cell."""

    EXPORTED = "exported"
    REFUSED = "refused"
    WRONG = "wrong"
    NO_SOURCE = "source cannot be made"


@dataclass(frozen=True)
class CellPaths:
    """The model, and the Hugging Face folder that it was made from.

    `twin` is the same exporter's graph of the same model in a form that ONNX Runtime's CPU provider
    runs, for sources that it does not run.
    """

    source: Path
    folder: Path
    twin: Path | None = None


@dataclass(frozen=True)
class Cell:
    """The outcome. `error` is the largest difference as a share of the largest logit."""

    route: str
    family: str
    status: Status
    reason: str = ""
    error: float = 0.0
    source_error: float | None = None
    source_tolerance: float = 0.0
    forms: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def source_is_right(self) -> bool:
        """Whether the source itself gives its family's numbers (or nothing can say so)."""
        return self.source_error is None or self.source_error < self.source_tolerance


class SilentObserver:
    """An observer that keeps the sites."""

    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Sites) -> None: ...


def measure_cell(route: str, family: str, paths: CellPaths, *, block_sparse: bool = False) -> Cell:
    """Exports the source twice (everything kept; a small window) and compares.

    `block_sparse`: what keeps everything has block-sparse layers of mass 1, and once more at mass
    0.9 their choice and their output are compared with the rule's and the function body's.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        try:
            report = _export(paths.source, Path(place) / "kept", _KEEP_ALL)
            if block_sparse:
                report = _with_blocks(paths.source, Path(place), report)
            _export(paths.source, Path(place) / "small", _small())
        except ExportError as error:
            failed = str(error).startswith("verification failed")
            status = Status.WRONG if failed else Status.REFUSED
            return Cell(route, family, status, str(error))
        cell = Cell(
            route, family, Status.EXPORTED, forms=tuple(sorted({x.form for x in report.layers}))
        )
        return _Comparison(cell, paths, Path(place)).outcome(start)


@lru_cache(maxsize=2)
def oracle_of(folder: Path) -> Oracle:
    """The family's float64 model; kept, for the cells of one family come one after another."""
    return Oracle(folder)


def _small() -> PatternRequest:
    return PatternRequest(
        PATTERN.num_sink_tokens, PATTERN.sliding_window_size, PATTERN.num_last_tokens
    )


def _export(path: Path, output: Path, pattern: PatternRequest) -> ExportReport:
    """All layers triangle; a model that slides windows only has a dense twin and nothing else."""
    options = ExportOptions(
        path, output, pattern=pattern, layers=LayerRequest(start_layer=0), weights="copy"
    )
    try:
        return export(options, SilentObserver())
    except ExportError as error:
        if "all chosen ones slide" not in str(error):
            raise
    return export(replace(options, dense=True, layers=LayerRequest()), SilentObserver())


def _with_blocks(path: Path, place: Path, kept: ExportReport) -> ExportReport:
    """All layers that slide no window, but for the deepest, block-sparse; see `measure_cell`.

    Returns the report of the export that keeps everything; that of before where no layer is left.
    """
    *sparse, triangle = kept.layers_of(LayerRole.TRIANGLE) or [0]
    if not sparse:
        return kept
    whole = ExportOptions(
        path, place / "kept", pattern=_KEEP_ALL, layers=LayerRequest(layers=(triangle,)),
        blocks=BlockRequest(tuple(sparse), mass=1.0, min_length=0), force=True,
    )  # fmt: skip
    blocks = replace(whole.blocks, mass=0.9)
    chosen = replace(whole, output=place / "chosen", pattern=_small(), blocks=blocks, verify=True)
    try:
        checks = {check.name for check in export(chosen, SilentObserver()).verification}
        assert any(name.startswith("choice of blocks") for name in checks), checks
    except ExportError as error:
        if str(error).startswith("verification failed"):
            raise
        logging.info("%s is not verified: %s", path, error)  # the CPU runs no such source
    return export(whole, SilentObserver())


@dataclass(frozen=True)
class _Trial:
    """A text and the calls that it comes in; the first `prompt` tokens are the prompt."""

    text: Text
    calls: tuple[int, ...]
    prompt: int


def _trials(left_padding: bool) -> list[_Trial]:
    """Longer than every window; chunks, batches and decode steps."""
    random = np.random.default_rng(11)
    steps = (36, 1, 1, 1, 1, 1)

    def trial(batch: int, calls: tuple[int, ...], pads: tuple[int, ...] = ()) -> _Trial:
        ids = random.integers(0, VOCABULARY, (batch, sum(calls)))
        first = np.zeros(batch, np.int64)
        first[: len(pads)] = pads
        return _Trial(Text(ids, first), calls, 36)

    trials = [trial(1, steps), trial(1, (15, 21, 5)), trial(3, steps)]
    if left_padding:
        trials += [trial(3, steps, (0, 3, 11)), trial(2, (15, 21, 5), (7, 0))]
    return trials


class _Comparison:
    """The source, its two exports and the float64 model, beside each other."""

    def __init__(self, cell: Cell, paths: CellPaths, place: Path) -> None:
        self._cell = cell
        self._paths = paths
        self._place = place
        self._oracle = oracle_of(paths.folder)
        self._manifest = Manifest.load(place / "kept")
        self._int4 = "int4" in cell.route
        self._worst: dict[str, float] = {}
        self._notes: list[str] = []

    def outcome(self, start: float) -> Cell:
        """The cell, filled in."""
        trials = _trials(self._manifest.left_padding)
        self._compare_kept(trials)
        if not self._manifest.triangle_layers:
            self._notes.append("dense twin: every layer slides a window of its own")
        else:
            self._compare_small(trials)
        worst = max(value for name, value in self._worst.items() if name != "source")
        wrong = {
            name: value
            for name, value in self._worst.items()
            if name != "source" and not value <= self._tolerance(name)
        }
        return replace(
            self._cell,
            status=Status.WRONG if wrong else Status.EXPORTED,
            reason=", ".join(f"{name} {value:.1e}" for name, value in wrong.items()),
            error=worst,
            source_error=self._worst.get("source"),
            source_tolerance=self._source_tolerance,
            seconds=time.perf_counter() - start,
            notes=tuple(self._notes),
        )

    def _compare_kept(self, trials: list[_Trial]) -> None:
        """Everything kept: kernel and function body against the source, or else the oracle."""
        kernel, body = self._exported("kept", self._manifest)
        sources = self._sources()
        for trial in trials:
            wanted = self._source_logits(sources, trial)
            true = None if self._int4 else self._oracle.logits(trial.text)
            if wanted is not None and true is not None:
                self._note("source", wanted, true, trial)
            if wanted is None:
                self._notes.append(
                    f"the source does not run calls {trial.calls} of {len(trial.text.ids)}"
                )
                wanted = true
            if wanted is None:
                continue
            self._note("kept, kernel", kernel.logits(trial.text, trial.calls), wanted, trial)
            self._note("kept, body", body.logits(trial.text, trial.calls), wanted, trial)

    def _exported(self, name: str, manifest: Manifest) -> tuple[Decoder, Decoder]:
        """An export with the native kernel and on its function body."""
        path = self._runnable(self._place / name / "model.onnx", name)
        return Decoder(path, manifest, kernel=True), Decoder(path, manifest, kernel=False)

    def _runnable(self, path: Path, name: str) -> Path:
        runnable = runnable_here(path, self._place / f"{name}-runnable")
        if runnable != path and _EXPERTS not in self._notes:
            self._notes.append(_EXPERTS)
        return runnable

    def _sources(self) -> list[Decoder]:
        """The source, if it opens here; then its twin, if it has one."""
        sources = []
        for name, path in (("source", self._paths.source), ("twin", self._paths.twin)):
            try:
                if path is not None:
                    path = self._runnable(path, name)
                    sources.append(Decoder(path, self._manifest, kernel=False))
            except Exception as error:  # ONNX Runtime's errors share no base class of their own
                self._notes.append(f"the {name} does not open on the CPU: {str(error)[:200]}")
        return sources

    def _source_logits(self, sources: list[Decoder], trial: _Trial) -> Array | None:
        for source in sources:
            try:
                logits = source.logits(trial.text, trial.calls)
            except Exception:  # GroupQueryAttention on the CPU takes no batch with a past, for one
                continue
            if source.path == self._paths.twin and _TWIN not in self._notes:
                self._notes.append(_TWIN)
            return logits
        return None

    def _tolerance(self, name: str) -> float:
        """Beside the float64 model, also what the source is off by (rounding everywhere)."""
        tolerance = _TOLERANCE[self._manifest.cache_dtype]
        if "source" not in self._worst and not self._int4:
            return tolerance + self._source_tolerance  # the source runs nowhere here
        if name.startswith("small window"):
            tolerance += 2 * min(self._worst.get("source", 0.0), self._source_tolerance)
        return tolerance

    @property
    def _source_tolerance(self) -> float:
        return _SOURCE_TOLERANCE[self._manifest.cache_dtype]

    def _knows_truth(self) -> bool:
        """Whether the float64 model says what this model should compute."""
        if self._int4:
            self._notes.append("small window: kernel against function body (weights are rounded)")
        elif self._worst.get("source", 0.0) > self._source_tolerance:
            self._notes.append("small window: kernel against function body (the source is off)")
        else:
            return True
        return False

    def _compare_small(self, trials: list[_Trial]) -> None:
        """A small window: against the float64 model with the same mask."""
        manifest = Manifest.load(self._place / "small")
        kernel, body = self._exported("small", manifest)
        trusted = self._knows_truth()
        for trial in trials:
            triangle = Triangle(frozenset(manifest.triangle_layers), PATTERN, trial.prompt)
            ours = kernel.logits(trial.text, trial.calls, trial.prompt)
            other = body.logits(trial.text, trial.calls, trial.prompt)
            wanted = self._oracle.logits(trial.text, triangle) if trusted else other
            self._note("small window, kernel", ours, wanted, trial)
            self._note("small window, body", other, wanted, trial)

    def _note(self, name: str, ours: Array, wanted: Array, trial: _Trial) -> None:
        """Keeps the largest difference over real tokens, as a share of the largest logit."""
        real = trial.text.mask[:, -ours.shape[1] :].astype(bool)
        wanted = wanted[:, -ours.shape[1] :]
        error = float(np.abs(ours - wanted)[real].max() / np.abs(wanted[real]).max())
        if not np.isfinite(error):
            error = float("inf")
        self._worst[name] = max(self._worst.get(name, 0.0), error)
