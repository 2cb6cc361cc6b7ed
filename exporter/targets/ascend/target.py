"""Ascend NPUs through CANN's atc: static graphs in standard operators over one cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import AscendRequest, ExportOptions
from trianglemix.exporter.targets._target import OfflineTools, Target
from trianglemix.exporter.targets.ascend.finding import Finding
from trianglemix.exporter.targets.ascend.folder import Progress, plan_folder, write_folder
from trianglemix.exporter.targets.ascend.lint import lint_file
from trianglemix.exporter.targets.ascend.prediction import Prediction, predict
from trianglemix.exporter.targets.ascend.row_cut import cuts_its_last_row
from trianglemix.exporter.targets.ascend.soc import find_soc
from trianglemix.exporter.targets.ascend.verify import check_can_run, verify_folder


def _package(
    model: ir.Model, manifest: Manifest, folder: Path, options: ExportOptions, progress: Progress
) -> tuple[Manifest, list[str]]:
    ascend = plan_folder(model, manifest, options.ascend or AscendRequest())
    manifest, notes = write_folder(ascend, manifest, folder, progress)
    if options.last_token_logits:
        notes.append("--last-token-logits changes nothing: static graphs give no others")
    return manifest, notes


def _predict(model: ir.Model, manifest: Manifest, options: ExportOptions) -> Prediction | None:
    """None with the custom operator: the cost model is of the block form."""
    if manifest.last_token_logits and not cuts_its_last_row(model.graph):
        raise ExportError(
            "the source's graph keeps the last token's logits only, by the attention mask, which "
            "a static graph has not; export the model that it was made from: these graphs give "
            "the last token's logits anyway"
        )
    if options.verify:
        check_can_run(manifest)
    ascend = plan_folder(model, manifest, options.ascend or AscendRequest())
    if ascend.plan.lowering == "custom":
        return None
    return predict(ascend.cost, options.prompt_length, ascend.soc, ascend.plan.banded_block)


def _lint(path: Path, options: AscendRequest) -> list[Finding]:
    return lint_file(path, find_soc(options.soc))


def _runs_as(options: ExportOptions) -> Mapping[str, str]:
    if options.ascend is not None and options.ascend.lowering == "custom":
        return dict.fromkeys(("triangle", "windowed", "dense"), "custom operator")
    return {"triangle": "block form", "windowed": "block form", "dense": "row blocks"}


TARGET: Final = Target(
    name="ascend",
    summary="static graphs for CANN's atc",
    lower=(),
    lower_dense_twin=(),
    left_padding=False,
    offline=OfflineTools(
        package=_package, predict=_predict, lint=_lint, verify=verify_folder, runs_as=_runs_as
    ),
)
