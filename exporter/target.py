"""What a target is: a named, ordered list of passes over a graph of TriangleAttention nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir


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
