"""The export report: what was found, what was done with each layer and why, what it should gain."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.graph.attention_node import LayerRole
from trianglemix.exporter.report.predicted_savings import AttentionCost, LastTokenSaving

FILE_NAME: Final = "export_report.json"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class LayerReport:
    """One row of the table."""

    layer: int
    node: str
    form: str
    num_heads: int
    kv_num_heads: int
    head_size: int
    value_head_size: int
    scale: float
    softcap: float
    mask: str
    action: str
    runs_as: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """One comparison of `--verify`."""

    name: str
    tokens: int
    max_error: float
    tolerance: float
    passed: bool


class Prediction(Protocol):
    """A target's own figures of what the export costs on its device: a dataclass, for the JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class ExportReport:
    """Everything the user is told, on the screen and in `export_report.json`."""

    source: str
    target: str
    opset: int
    ir_version: int
    pattern: TrianglePattern | None
    layer_choice: str
    layers: tuple[LayerReport, ...]
    cost: AttentionCost
    last_token: LastTokenSaving | None
    shared_cache: bool
    left_padding: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verification: tuple[VerifyReport, ...] = ()
    prediction: Prediction | None = None
    block_rule: BlockRule | None = None
    block_choice: str = ""

    def layers_of(self, role: LayerRole) -> list[int]:
        """The layers that have a role."""
        return [layer.layer for layer in self.layers if layer.action == role.value]

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        content["cost"]["share"] = self.cost.share
        content["triangle_layers"] = self.layers_of(LayerRole.TRIANGLE)
        content["block_sparse_layers"] = self.layers_of(LayerRole.BLOCK_SPARSE)
        return content

    def save(self, folder: Path) -> None:
        """Writes `export_report.json`."""
        text = json.dumps(self.as_json(), indent=2) + "\n"
        (folder / FILE_NAME).write_text(text, encoding="utf-8")
