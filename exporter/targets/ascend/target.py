"""The target ascend: what its command line, its report, its folder and its check are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.onnx_file.model_file import Progress
from trianglemix.exporter.options import Dtype, ExportOptions
from trianglemix.exporter.report.export_report import ExportReport, Prediction, VerifyReport
from trianglemix.exporter.targets._target import Finished, Target, TargetExport
from trianglemix.exporter.targets.ascend.lint import lint_file, print_findings
from trianglemix.exporter.targets.ascend.options import (
    OPTIONS,
    AscendRequest,
    read_request,
)
from trianglemix.exporter.targets.ascend.prediction import (
    AscendPrediction,
    predict,
    print_prediction,
)
from trianglemix.exporter.targets.ascend.row_cut import cuts_its_last_row
from trianglemix.exporter.targets.ascend.soc import find_soc
from trianglemix.exporter.targets.ascend.static_folder import AscendModel, plan_folder, write_folder
from trianglemix.exporter.targets.ascend.verify_static import check_can_run, verify_folder
from trianglemix.manifest.manifest import Manifest


class _Ascend(Target):
    name = "ascend"
    summary = "static graphs for CANN's atc"
    options = OPTIONS

    def read_settings(self, given: Mapping[str, Any]) -> AscendRequest | None:
        """See `Target.read_settings`."""
        return read_request(given)

    def runs_alone(self, given: Mapping[str, Any], console: Console) -> bool:
        """`--lint`; raises ExportError where the source cannot be read, or has errors."""
        request = read_request(given)
        if not given["lint"] or request is None:
            return False
        source = given["source"]
        print_findings(source, lint_file(source, find_soc(request.soc)), console)
        return True

    def tells_without_output(self, given: Mapping[str, Any]) -> bool:
        """`--cost`."""
        return bool(given["cost"])

    def weights_dtype(self, options: ExportOptions) -> Dtype:
        """See `Target.weights_dtype`."""
        soc = AscendRequest.of(options).soc
        if not find_soc(soc).has_bfloat16:
            raise ExportError(
                f"the weights in {options.source} are bfloat16, which {soc} does not have; add "
                "--dtype float16 (a weight that float16 cannot hold is then refused by its name)"
            )
        return "auto"

    def cuts_logits(self, options: ExportOptions) -> bool:
        """Never: its own graphs cut the row, and give no others."""
        return False

    def runs_as(self, options: ExportOptions) -> Mapping[str, str]:
        """See `Target.runs_as`."""
        if AscendRequest.of(options).lowering == "custom":
            return dict.fromkeys(("triangle", "windowed", "dense"), "custom operator")
        return {"triangle": "block form", "windowed": "block form", "dense": "row blocks"}

    def show(self, report: ExportReport, options: ExportOptions, console: Console) -> None:
        """`--cost`."""
        if AscendRequest.of(options).cost and isinstance(report.prediction, AscendPrediction):
            print_prediction(report.prediction, console)

    def begin(self, finished: Finished) -> TargetExport:
        """See `Target.begin`."""
        model = finished.graph.model
        if finished.manifest.last_token_logits and not cuts_its_last_row(model.graph):
            raise ExportError(
                "the source's graph keeps the last token's logits only, by the attention mask, "
                "which a static graph has not; export the model that it was made from: these "
                "graphs give the last token's logits anyway"
            )
        if finished.options.verify:
            check_can_run(finished.manifest)
        request = AscendRequest.of(finished.options)
        return _StaticFolder(finished, request, plan_folder(model, finished.manifest, request))


@dataclass(frozen=True)
class _StaticFolder(TargetExport):
    finished: Finished
    request: AscendRequest
    ascend: AscendModel

    @property
    def prediction(self) -> Prediction | None:
        """None with the custom operator: the cost model is of the block form."""
        if self.request.lowering == "custom":
            return None
        ascend, finished = self.ascend, self.finished
        length = finished.options.predicted_tokens(finished.manifest.context_length)
        return predict(ascend.cost, length, ascend.soc, ascend.plan.banded_block)

    def write(self, folder: Path, progress: Progress) -> tuple[Manifest, list[str]]:
        """See `write_folder`."""
        manifest, notes = write_folder(self.ascend, self.finished.manifest, folder, progress)
        if self.finished.options.last_token_logits:
            notes.append("--last-token-logits changes nothing: static graphs give no others")
        return manifest, notes

    def verify(self, folder: Path, manifest: Manifest) -> tuple[list[VerifyReport], list[str]]:
        """See `verify_folder`."""
        return verify_folder(self.finished, folder, manifest)


TARGET: Final = _Ascend()
