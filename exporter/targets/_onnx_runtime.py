"""Targets that ONNX Runtime runs as one model.onnx: what is written for them, and verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir
from trianglemix.exporter.attention.sites import AttentionSite
from trianglemix.exporter.folder.genai_config import write_genai_config
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.fold_rotation import FoldRotationPass
from trianglemix.exporter.interface.language_model_head import find_head
from trianglemix.exporter.onnx_file.model_file import MODEL_FILE, Progress, save_model
from trianglemix.exporter.options import Weights
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.exporter.sources.model_config import special_ids
from trianglemix.exporter.targets._target import Finished, Target, TargetExport
from trianglemix.exporter.verify.verify_export import Verification, verify_export
from trianglemix.manifest.manifest import Manifest

CUDA: Final = "CUDAExecutionProvider"


class OnnxRuntimeTarget(Target):
    """`lower` are the passes of a triangle model, `lower_dense` those of a dense twin; before both,
    where it `rotates_inside`, attention nodes get back what they did themselves in the source.

    `provider` is ONNX Runtime's; `--verify` takes the CPU's where it is not installed.
    """

    block_sparse = True
    rotates_inside: ClassVar[bool] = False
    lower: ClassVar[Sequence[type[ir.passes.InPlacePass]]] = ()
    lower_dense: ClassVar[Sequence[type[ir.passes.InPlacePass]]] = ()
    provider: ClassVar[str]

    def passes(
        self, sites: Sequence[AttentionSite], *, dense: bool
    ) -> Sequence[ir.passes.InPlacePass]:
        """See `Target.passes`."""
        lower = [make() for make in (self.lower_dense if dense else self.lower)]
        if not self.rotates_inside:
            return lower
        return [FoldRotationPass(node for site in sites for node in site.prologue), *lower]

    def begin(self, finished: Finished) -> TargetExport:
        """See `Target.begin`."""
        return _OneModel(finished, self.provider)


@dataclass(frozen=True)
class _OneModel(TargetExport):
    finished: Finished
    provider: str

    def write(self, folder: Path, progress: Progress) -> tuple[Manifest, list[str]]:
        """The model's files, and genai's configuration where the source has one."""
        given = self.finished
        model, source = given.graph.model, given.source
        ours = source.path.is_relative_to(folder)  # made on the way, and soon to be removed
        weights: Weights = "link" if ours else given.options.weights
        notes = save_model(model, source.path.parent, folder, weights, progress)
        notes = [] if ours else notes
        library = bool(AttentionNode.all_of(model.graph))
        notes += write_genai_config(source.companions, folder, MODEL_FILE, needs_library=library)
        return given.manifest, notes

    def verify(self, folder: Path, manifest: Manifest) -> tuple[list[VerifyReport], list[str]]:
        """See `verify_export`."""
        given = self.finished
        head = find_head(given.graph.roles)
        windows = (site.mask.window for site in given.sites)
        return verify_export(
            Verification(
                given.source.path,
                folder,
                manifest,
                vocabulary=(head.vocabulary_size if head else None) or 2,
                num_heads=max(site.shape.num_heads for site in given.sites),
                tokens=given.options.verify_tokens,
                provider=self.provider,
                atol=given.options.atol,
                windows=tuple(window for window in windows if window is not None),
                special_ids=special_ids(given.source.companions),
            )
        )
