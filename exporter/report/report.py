"""The export report: what was found, what was done with each layer and why, what it should gain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from trianglemix.custom_ops.contract import TrianglePattern
from trianglemix.exporter.attention.sites import AttentionSite, Refusal
from trianglemix.exporter.layers.choice import LayerChoice
from trianglemix.exporter.report.cost import AttentionCost, LastTokenSaving

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

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        content["cost"]["share"] = self.cost.share
        content["triangle_layers"] = [
            layer.layer for layer in self.layers if layer.action == "triangle"
        ]
        return content

    def save(self, folder: Path) -> None:
        """Writes `export_report.json`."""
        text = json.dumps(self.as_json(), indent=2) + "\n"
        (folder / FILE_NAME).write_text(text, encoding="utf-8")


def layer_reports(
    sites: tuple[AttentionSite, ...],
    choice: LayerChoice,
    runs_as: Mapping[str, str],
    operators: Mapping[int, str],
) -> tuple[LayerReport, ...]:
    """A row per layer, with what it ended up as: by its action, or else by its operator."""
    return tuple(
        _layer_report(site, *action, runs_as.get(action[0], operators.get(site.layer, "")))
        for site in sites
        for action in [_action(site, choice)]
    )


def _layer_report(site: AttentionSite, action: str, reason: str, runs_as: str) -> LayerReport:
    return LayerReport(
        layer=site.layer,
        node=site.anchor.name or site.anchor.outputs[0].name or "",
        form=site.form,
        num_heads=site.shape.num_heads,
        kv_num_heads=site.shape.kv_num_heads,
        head_size=site.shape.head_size,
        value_head_size=site.shape.value_head_size,
        scale=site.scale,
        softcap=site.softcap,
        mask=str(site.mask),
        action=action,
        runs_as=runs_as,
        reason=reason,
    )


def _action(site: AttentionSite, choice: LayerChoice) -> tuple[str, str]:
    if site.layer in choice.layers:
        return "triangle", choice.origin
    if site.mask.window is not None:
        chosen = "chosen, but " if site.layer in choice.skipped else ""
        return "windowed", f"{chosen}the source slides a window here; kept exactly"
    return "dense", "not among the triangle layers"


def print_report(report: ExportReport, console: Console) -> None:
    """The table, the prediction, notes and warnings."""
    table = Table(title=f"{report.source} → {report.target}", title_justify="left")
    for name in ("layer", "found as", "heads", "head size", "scale", "mask", "action", "runs as"):
        table.add_column(name, justify="right" if name == "layer" else "left", no_wrap=True)
    for row in report.layers:
        heads = f"{row.num_heads}" + (f"/{row.kv_num_heads}" if row.kv_num_heads else "")
        size = (
            f"{row.head_size}"
            if row.head_size == row.value_head_size
            else f"{row.head_size}/{row.value_head_size}"
        )
        scale = f"{row.scale:.5g}" + (f" cap {row.softcap:g}" if row.softcap else "")
        table.add_row(
            str(row.layer), row.form, heads, size, scale, row.mask, row.action, row.runs_as
        )
    console.print(table)
    console.print(f"layers chosen by: {report.layer_choice}", highlight=False)
    for line in summary_lines(report):
        console.print(line, highlight=False, markup=False)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def summary_lines(report: ExportReport) -> list[str]:
    """The prediction and the notes, a line each."""
    cost = report.cost
    lines = [
        f"attention over a prompt of {cost.prompt_length} tokens: "
        f"{_count(cost.triangle_flops)}FLOP instead of {_count(cost.dense_flops)}FLOP "
        f"({100 * cost.share:.1f} %)"
    ]
    if report.pattern is not None:
        pattern = report.pattern
        lines.append(
            f"pattern: {pattern.num_sink_tokens} sinks, window {pattern.sliding_window_size}, "
            f"last {pattern.num_last_tokens}; nothing is dropped up to "
            f"{pattern.exact_length} tokens"
        )
    if report.last_token is not None:
        saved = report.last_token
        lines.append(
            f"last-token logits save {_count(saved.logits_bytes)}B of logits and "
            f"{_count(saved.head_flops)}FLOP of the LM head at {cost.prompt_length} tokens"
            + (f", and {_count(saved.tail_flops)}FLOP of the last layer" * bool(saved.tail_flops))
        )
    for check in report.verification:
        verdict = "ok" if check.passed else "FAILED"
        lines.append(
            f"verify {check.name} ({check.tokens} tokens): max error {check.max_error:.2e}, "
            f"allowed {check.tolerance:.2e}: {verdict}"
        )
    return [*lines, *report.notes]


def print_near_misses(refusals: tuple[Refusal, ...], console: Console) -> None:
    """What looked like attention, and why it was not taken."""
    if not refusals:
        console.print("near misses: none")
    for refusal in refusals:
        kind = "attention not understood" if refusal.is_attention else "not attention"
        console.print(f"{kind}: {refusal.node}: {refusal.reason}", highlight=False, markup=False)


def _count(number: float) -> str:
    """`1234567` as `1.23 M`."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} E"
