"""A toy target in one file: ONNX Runtime's CPU provider, with a prediction and an option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from trianglemix.exporter.onnx_file.model_file import Progress
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.report.export_report import ExportReport, VerifyReport
from trianglemix.exporter.targets._group_query_attention import LowerDenseSitesPass
from trianglemix.exporter.targets._onnx_runtime import OnnxRuntimeTarget
from trianglemix.exporter.targets._target import Finished, TargetExport
from trianglemix.exporter.verify.session import CPU
from trianglemix.manifest.manifest import Manifest


@dataclass(frozen=True)
class PacePrediction:
    seconds: float


@dataclass(frozen=True)
class _PaceExport(TargetExport):
    plain: TargetExport
    seconds: float

    @property
    def prediction(self) -> PacePrediction:
        return PacePrediction(self.seconds)

    def write(self, folder: Path, progress: Progress) -> tuple[Manifest, list[str]]:
        return self.plain.write(folder, progress)

    def verify(self, folder: Path, manifest: Manifest) -> tuple[list[VerifyReport], list[str]]:
        return self.plain.verify(folder, manifest)


class _Pace(OnnxRuntimeTarget):
    name = "pace"
    summary = "a toy that tells how long it takes"
    provider = CPU
    lower = lower_dense = (LowerDenseSitesPass,)
    options = (click.option("--pace", type=float, help="Pace: tokens in a second."),)

    def read_settings(self, given: Mapping[str, Any]) -> float | None:
        if given["pace"] is not None and given["target"] != self.name:
            raise click.UsageError("--pace belongs to --target pace")
        return given["pace"]

    def show(self, report: ExportReport, options: ExportOptions, console: Console) -> None:
        console.print(f"takes {report.prediction.seconds:g} s")

    def begin(self, finished: Finished) -> TargetExport:
        options = finished.options
        return _PaceExport(super().begin(finished), options.prompt_length / options.settings)


TARGET: Final = _Pace()
