"""A comparison as one self-contained HTML page, with its chart drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Final

from trianglemix.evaluation.comparison import Comparison, Row
from trianglemix.evaluation.outcome import ModelRun
from trianglemix.evaluation.report import percent, ratio_text, warnings_of

_LEFT: Final = 150
_WIDTH: Final = 520
_LINE: Final = 34
_COLORS: Final = ("#8a8f98", "#d1603d")
_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem;
       font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
       white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } tr.total td { border-top: 2px solid #888;
       font-weight: 600; } svg text { font: 13px system-ui, sans-serif; fill: #333; }
.note { color: #555; font-size: .9rem; }
"""


def save_page(comparison: Comparison, path: Path) -> None:
    """Table, chart, what each model is."""
    runs = [run for run in (comparison.baseline, comparison.candidate) if run]
    title = " against ".join(escape(run.name) for run in reversed(runs))
    setup = comparison.setup
    body = [
        f"<h1>{title}</h1>",
        f"<p>Prompts of up to {setup.tokens} tokens (answer included), {setup.samples} samples a "
        "task, the same for each model. Intervals hold 95%; differences and ratios are of "
        "pairs.</p>",
        *(f'<p class="note">{escape(text)}.</p>' for text in warnings_of(comparison)),
        f'<div class="wide">{_chart(comparison, runs)}</div>',
        f'<div class="wide">{_table(comparison)}</div>',
        "<h2>Models</h2>",
        *(_model(run) for run in runs),
    ]
    path.write_text(html_page(title, _STYLE, body), encoding="utf-8")


def html_page(title: str, style: str, body: Iterable[str]) -> str:
    """A page that needs no other file; `title` and `body` are HTML already."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _chart(comparison: Comparison, runs: list[ModelRun]) -> str:
    """Dots with intervals, a line for each task; 0 to 100% from left to right."""
    rows = comparison.rows
    height = _LINE * len(rows) + 58
    parts = [
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 30} {height}" width="{_LEFT + _WIDTH + 30}" '
        'role="img" aria-label="percent right by task and model">'
    ]
    for n, run in enumerate(runs):
        left = _LEFT + 190 * n
        color = _COLORS[n + 2 - len(runs)]
        parts.append(f'<circle cx="{left}" cy="14" r="5" fill="{color}"/>')
        parts.append(f'<text x="{left + 10}" y="18">{escape(run.name)}</text>')
    for tick in range(0, 101, 25):
        x = _place(tick / 100)
        parts.append(f'<line x1="{x}" x2="{x}" y1="30" y2="{height - 22}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{tick}%</text>')
    for n, row in enumerate(rows):
        parts.append(_chart_row(row, 48 + _LINE * n, bool(comparison.baseline)))
    return "".join(parts) + "</svg>"


def _chart_row(row: Row, y: int, paired: bool) -> str:
    parts = [f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(row.task)}</text>']
    marks = [(row.baseline, -5), (row.candidate, 5)] if paired else [(row.candidate, 0)]
    for (interval, shift), color in zip(marks, _COLORS[2 - len(marks) :], strict=True):
        low, mean, high = (_place(x) for x in (interval.low, interval.mean, interval.high))
        at = y + shift
        parts.append(
            f'<line x1="{low}" x2="{high}" y1="{at}" y2="{at}" stroke="{color}" stroke-width="2"/>'
            f'<circle cx="{mean}" cy="{at}" r="4.5" fill="{color}"/>'
        )
    return "".join(parts)


def _place(share: float) -> float:
    return round(_LEFT + share * _WIDTH, 1)


def _table(comparison: Comparison) -> str:
    base, ours = comparison.baseline, comparison.candidate
    if base is None:
        head = f"<th>task</th><th>{escape(ours.name)}, % right</th>"
    else:
        head = (
            f"<th>task</th><th>{escape(base.name)}, % right</th>"
            f"<th>{escape(ours.name)}, % right</th><th>difference, points</th>"
            "<th>first token, time ratio</th>"
        )
    lines = []
    for row in comparison.rows:
        cells = [row.task]
        if base is not None:
            cells.append(percent(row.baseline))
        cells.append(percent(row.candidate))
        if base is not None:
            cells += [percent(row.difference, signed=True), ratio_text(row.ttft_ratio)]
        kind = ' class="total"' if row.task == "all" else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _model(run: ModelRun) -> str:
    memory = "unknown" if run.peak_memory_mb is None else f"{run.peak_memory_mb:.0f} MiB"
    facts = dict(run.facts)
    for kind in ("triangle", "block_sparse"):
        layers = facts.pop(f"{kind}_layers", [])
        told = "not told" if layers is None else ", ".join(map(str, layers)) or "none"
        facts[f"{kind.replace('_', '-')} layers"] = told
    if facts.get("density") is not None:
        facts["density"] = f"{facts['density']:.3f} of the causal blocks kept, on average"
    facts["time to first token, median"] = f"{run.median_ttft_s():.2f} s"
    facts["peak memory"] = memory
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>"
        for k, v in facts.items()
        if v is not None
    )
    return f'<h3>{escape(run.name)}</h3><div class="wide"><table>{rows}</table></div>'
