"""The export report on the screen: the table of layers, the prediction, notes, near misses."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from trianglemix.command_line import print_warning
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.exporter.attention.sites import Refusal
from trianglemix.exporter.graph.attention_node import LayerRole
from trianglemix.exporter.options import layer_ranges
from trianglemix.exporter.report.export_report import ExportReport


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
    console.print(f"layers chosen by: {report.layer_choice}")
    if report.block_choice:
        console.print(f"block-sparse layers chosen by: {report.block_choice}")
    for line in summary_lines(report):
        console.print(line)
    for warning in report.warnings:
        print_warning(warning, console)


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
    if report.block_rule is not None:
        lines.append(_block_line(report, report.block_rule))
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


def _block_line(report: ExportReport, rule: BlockRule) -> str:
    layers = layer_ranges(report.layers_of(LayerRole.BLOCK_SPARSE), ", ")
    if rule.is_dense:
        return f"block-sparse layers {layers}: keep every block, as dense layers do"
    return (
        f"block-sparse layers {layers}: keep {100 * rule.mass:g} % of the mass, by the scores of 8 "
        f"rows of each 128; prompts of up to {rule.min_length} tokens are read densely"
    )


def print_near_misses(refusals: tuple[Refusal, ...], console: Console) -> None:
    """What looked like attention, and why it was not taken."""
    if not refusals:
        console.print("near misses: none")
    for refusal in refusals:
        kind = "attention not understood" if refusal.is_attention else "not attention"
        console.print(f"{kind}: {refusal.node}: {refusal.reason}")


def _count(number: float) -> str:
    """`1234567` as `1.23 M`."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} E"
