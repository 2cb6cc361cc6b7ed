"""Ascend NPUs through CANN's atc: static graphs in standard operators over one cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.ascend.finding import Finding
from trianglemix.exporter.ascend.folder import Progress, plan_folder, write_folder
from trianglemix.exporter.ascend.lint import lint_file
from trianglemix.exporter.ascend.prediction import Prediction, predict
from trianglemix.exporter.ascend.soc import find_soc
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import AscendRequest, ExportOptions
from trianglemix.exporter.target import OfflineTools, Target


def _package(
    model: ir.Model, manifest: Manifest, folder: Path, options: ExportOptions, progress: Progress
) -> tuple[Manifest, list[str]]:
    ascend = plan_folder(model, manifest, options.ascend or AscendRequest())
    return write_folder(ascend, manifest, folder, progress)


def _predict(model: ir.Model, manifest: Manifest, options: ExportOptions) -> Prediction:
    if manifest.last_token_logits:
        raise ExportError(
            "the graph gives last-token logits already, by the attention mask that a static graph "
            "has not; leave --last-token-logits out: these graphs give the last token's anyway"
        )
    ascend = plan_folder(model, manifest, options.ascend or AscendRequest())
    return predict(ascend.cost, options.prompt_length, ascend.soc, ascend.plan.banded_block)


def _lint(path: Path, options: AscendRequest) -> list[Finding]:
    return lint_file(path, find_soc(options.soc))


_RUNS_AS: Final = {
    "triangle": "block form",
    "windowed": "block form",
    "dense": "row blocks",
}
TARGET: Final = Target(
    name="ascend",
    summary="static graphs for CANN's atc: block form in triangle layers, row blocks in dense ones",
    lower=(),
    lower_dense_twin=(),
    left_padding=False,
    offline=OfflineTools(package=_package, predict=_predict, lint=_lint, runs_as=_RUNS_AS),
)
