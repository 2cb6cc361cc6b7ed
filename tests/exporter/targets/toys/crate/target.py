"""A toy target that is no ONNX Runtime's: it writes a file of its own, and looks at that again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
import onnx_ir as ir
from trianglemix.exporter.onnx_file.model_file import Progress
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.exporter.targets._target import Finished, Target, TargetExport
from trianglemix.exporter.targets.crate.weighing import CratePrediction, weigh
from trianglemix.manifest.manifest import Manifest

_FILE: Final = "crate.onnx"


@dataclass(frozen=True)
class _CrateExport(TargetExport):
    finished: Finished

    @property
    def prediction(self) -> CratePrediction:
        return weigh(self.finished.graph.model)

    def write(self, folder: Path, progress: Progress) -> tuple[Manifest, list[str]]:
        ir.save(self.finished.graph.model, folder / _FILE)
        return replace(self.finished.manifest, model_file=_FILE), ["crated"]

    def verify(self, folder: Path, manifest: Manifest) -> tuple[list[VerifyReport], list[str]]:
        lost = abs(weigh(ir.load(folder / manifest.model_file)).nodes - self.prediction.nodes)
        return [VerifyReport("nodes in the crate", 1, lost, 0, lost == 0)], []


class _Crate(Target):
    name = "crate"
    summary = "a toy that packs a graph"
    options = (click.option("--crate-label", help="Crate: what stands on it."),)

    def begin(self, finished: Finished) -> TargetExport:
        return _CrateExport(finished)


TARGET: Final = _Crate()
