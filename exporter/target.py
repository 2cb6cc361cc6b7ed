"""What a target is: a named, ordered list of passes over a graph of TriangleAttention nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.ascend.finding import Finding
from trianglemix.exporter.ascend.prediction import Prediction
from trianglemix.exporter.options import AscendRequest, ExportOptions

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OfflineTools:
    """What a target brings whose models are compiled elsewhere.

    `package` writes the folder from the canonical graph in place of one model.onnx, and returns
    its manifest and notes; `predict` says what it would cost, None where nothing is known;
    `lint` checks an ONNX file; `runs_as` says what becomes of a "triangle", "windowed" or "dense"
    layer.
    """

    package: Callable[
        [ir.Model, Manifest, Path, ExportOptions, Progress], tuple[Manifest, list[str]]
    ]
    predict: Callable[[ir.Model, Manifest, ExportOptions], Prediction | None]
    lint: Callable[[Path, AscendRequest], list[Finding]]
    runs_as: Callable[[ExportOptions], Mapping[str, str]]


@dataclass(frozen=True)
class Target:
    """How a device runs the canonical graph.

    `lower` passes apply to a triangle model, `lower_dense_twin` passes to a model without any
    triangle layer. `left_padding`: rows of a batch may be padded on the left in a triangle model.
    """

    name: str
    summary: str
    lower: tuple[Callable[[], ir.passes.InPlacePass], ...]
    lower_dense_twin: tuple[Callable[[], ir.passes.InPlacePass], ...]
    left_padding: bool
    offline: OfflineTools | None = None
