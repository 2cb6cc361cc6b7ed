"""What a target is: how a device runs the canonical graph, behind one interface.

The canonical graph has a node of our operators for each layer's attention. A target that ONNX
Runtime runs as one model.onnx needs no more than `targets/_onnx_runtime.py` gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from rich.console import Console
from trianglemix.exporter.attention.sites import AttentionSite
from trianglemix.exporter.folder.fill_manifest import ExportedGraph
from trianglemix.exporter.onnx_file.model_file import Progress
from trianglemix.exporter.options import Dtype, ExportOptions
from trianglemix.exporter.report.export_report import ExportReport, Prediction, VerifyReport
from trianglemix.exporter.sources.find_source import Source
from trianglemix.manifest.manifest import Manifest

CommandOption = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What `click.option(...)` returns."""


@dataclass(frozen=True)
class Finished:
    """A canonical graph with the target's passes applied, and what it was made of.

    `manifest` names its inputs and outputs, which are the source's.
    """

    options: ExportOptions
    source: Source
    sites: tuple[AttentionSite, ...]
    graph: ExportedGraph
    manifest: Manifest


class TargetExport(ABC):
    """One model on its way to a device."""

    @property
    def prediction(self) -> Prediction | None:
        """What it would cost on the device; None where nobody knows."""
        return None

    @abstractmethod
    def write(self, folder: Path, progress: Progress) -> tuple[Manifest, list[str]]:
        """Writes graphs and weights; returns the folder's manifest, and notes."""

    @abstractmethod
    def verify(self, folder: Path, manifest: Manifest) -> tuple[list[VerifyReport], list[str]]:
        """Runs the folder (`manifest` its own) beside its source; returns comparisons and notes.

        Raises:
            ExportError: a model does not open or run.
        """


class Target(ABC):
    """A device. What a target leaves out is what most of them do.

    `summary` is what `--help` says. `left_padding`: rows of a batch may be padded on the left in
    a triangle model, where its source takes that. `block_sparse`: it runs BlockSparseAttention;
    elsewhere such layers stay dense. `options` are what it adds to the command line.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    left_padding: ClassVar[bool] = False
    block_sparse: ClassVar[bool] = False
    options: ClassVar[Sequence[CommandOption]] = ()

    def read_settings(self, given: Mapping[str, Any]) -> object | None:
        """Its own part of `ExportOptions.settings`, from the command line's values by name.

        Raises:
            click.UsageError: an option of this target with another one.
        """
        return None

    def runs_alone(self, given: Mapping[str, Any], console: Console) -> bool:
        """Does what an option of its own asks for in place of an export; False if none does."""
        return False

    def tells_without_output(self, given: Mapping[str, Any]) -> bool:
        """Whether an option of its own asks for figures, for which no output folder is needed."""
        return False

    def weights_dtype(self, options: ExportOptions) -> Dtype:
        """What bfloat16 weights of a Hugging Face folder become where nothing was asked for.

        Raises:
            ExportError: the device has no bfloat16.
        """
        return "auto"

    def cuts_logits(self, options: ExportOptions) -> bool:
        """Whether the canonical graph shall give the last token's logits only."""
        return options.last_token_logits

    def passes(
        self, sites: Sequence[AttentionSite], *, dense: bool
    ) -> Sequence[ir.passes.InPlacePass]:
        """What is done to the canonical graph of `sites`; `dense` where no layer is a triangle."""
        return ()

    def runs_as(self, options: ExportOptions) -> Mapping[str, str]:
        """What a layer of each role becomes, if its node does not tell; by `LayerRole`'s value."""
        return {}

    def show(self, report: ExportReport, options: ExportOptions, console: Console) -> None:
        """Prints behind the report what options of its own ask for."""
        return

    @abstractmethod
    def begin(self, finished: Finished) -> TargetExport:
        """One export to this device; nothing is written yet.

        Raises:
            ExportError, RefusedError: the device cannot run it.
        """
