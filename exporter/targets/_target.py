"""What a target is: a named, ordered list of passes over a graph of TriangleAttention nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.options import AscendRequest, ExportOptions
from trianglemix.exporter.report.report import VerifyReport
from trianglemix.exporter.targets.ascend.finding import Finding
from trianglemix.exporter.targets.ascend.prediction import Prediction

Progress = Callable[[int, int], None]
CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"


@dataclass(frozen=True)
class OfflineCheck:
    """What `--verify` compares: the source, and the folder that was made of it.

    `canonical` is the graph with the operator, `manifest` names its inputs and outputs (the
    source's); `packaged` is the folder's own. `scratch` is a folder that is removed afterwards.
    """

    source: Path
    canonical: ir.Model
    manifest: Manifest
    folder: Path
    packaged: Manifest
    scratch: Path
    vocabulary: int
    atol: float | None


@dataclass(frozen=True)
class OfflineTools:
    """What a target brings whose models are compiled elsewhere.

    `package` writes the folder from the canonical graph in place of one model.onnx, and returns
    its manifest and notes; `predict` says what it would cost, None where nothing is known;
    `lint` checks an ONNX file; `verify` runs the folder beside its source, and returns the
    comparisons and notes; `runs_as` says what becomes of a "triangle", "windowed" or "dense" layer.
    """

    package: Callable[
        [ir.Model, Manifest, Path, ExportOptions, Progress], tuple[Manifest, list[str]]
    ]
    predict: Callable[[ir.Model, Manifest, ExportOptions], Prediction | None]
    lint: Callable[[Path, AscendRequest], list[Finding]]
    verify: Callable[[OfflineCheck], tuple[list[VerifyReport], list[str]]]
    runs_as: Callable[[ExportOptions], Mapping[str, str]]


@dataclass(frozen=True)
class Target:
    """How a device runs the canonical graph.

    `summary` is what `--help` says. `lower` passes apply to a triangle model, `lower_dense_twin`
    passes to a model without any triangle layer. `left_padding`: rows of a batch may be padded on
    the left in a triangle model, where its source takes that. `provider` is ONNX Runtime's;
    `--verify` takes the CPU's where it is not installed.
    """

    name: str
    summary: str
    lower: tuple[Callable[[], ir.passes.InPlacePass], ...]
    lower_dense_twin: tuple[Callable[[], ir.passes.InPlacePass], ...]
    left_padding: bool
    provider: str = CPU
    offline: OfflineTools | None = None
