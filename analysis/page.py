"""One self-contained HTML page of an analysis, and the pictures beside it as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from trianglemix.analysis.block_page import MEASURED, block_parts, block_pictures
from trianglemix.analysis.page_parts import picture_part, score_row
from trianglemix.analysis.plots import accuracy_curve, gradient_bars, mask_picture
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.page import html_page
from trianglemix.exporter.layers.plan import Plan

_MASK_FACTOR: Final = 3
"""The mask is drawn for a prompt this many times as long as what is kept whole."""
_MASK_LIMIT: Final = 2048
_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; } figure { margin: 1rem 0; overflow-x: auto; }
figcaption { color: #555; font-size: .9rem; max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } code { overflow-wrap: anywhere; }
"""


def save_pictures(plan: Plan, output: Path) -> Path:
    """Writes `<plan>.gradients.png`, `.mask.png`, `.accuracy.png` and `.html`; returns the page.

    The plan's figures are those of `plan_writer.figures_of`; without them (a plan from elsewhere)
    gradients and accuracy are left out. A section on block-sparse layers adds `.blocks.png` and
    `.lengths.png`.
    """
    pattern = plan.pattern or TrianglePattern()
    length = min(_MASK_LIMIT, _MASK_FACTOR * (pattern.exact_length or _MASK_LIMIT))
    pictures = {"mask": mask_picture(pattern, length)}
    if "gradients_by_layer" in plan.figures:
        gradients = plan.figures["gradients_by_layer"]
        pictures["gradients"] = gradient_bars(gradients, plan.triangle_layers)
        if plan.figures.get("check"):
            pictures["accuracy"] = accuracy_curve(plan.figures["check"])
    if plan.block_sparse and MEASURED in plan.block_sparse.figures:
        pictures |= block_pictures(plan.block_sparse)
    for name, png in pictures.items():
        output.with_suffix(f".{name}.png").write_bytes(png)
    page = output.with_suffix(".html")
    page.write_text(_page(plan, pictures, length), encoding="utf-8")
    return page


def _page(plan: Plan, pictures: Mapping[str, bytes], length: int) -> str:
    name = escape(plan.name)
    pattern = plan.pattern or TrianglePattern()
    parts = [
        f"<h1>Layers of {name}</h1>",
        f"<p>Triangle layers: <code>--layers {plan.layer_list}</code> "
        f"({len(plan.chosen_layers)} of {plan.fingerprint.num_layers} layers). "
        f"{escape(plan.origin)}.</p>",
    ]
    if "gradients" in pictures:
        parts += [
            "<h2>What each section of each layer is worth</h2>",
            picture_part(
                pictures["gradients"],
                "Mean absolute gradient of the right answer's logit with respect to a section's "
                "attention weights, on a log scale. A layer whose Middle bar is short loses little "
                "when the Middle section is dropped.",
            ),
            _stability(plan.figures),
        ]
    if "accuracy" in pictures:
        parts += ["<h2>The check on a task</h2>", _check_part(plan, pictures["accuracy"])]
    parts += [
        "<h2>What a triangle layer keeps</h2>",
        picture_part(
            pictures["mask"],
            f"A prompt of {length} tokens with {pattern.num_sink_tokens} sinks, a window of "
            f"{pattern.sliding_window_size} and {pattern.num_last_tokens} dense last rows.",
        ),
    ]
    if plan.block_sparse and "blocks" in pictures:
        parts += block_parts(plan.block_sparse, pictures)
    return html_page(f"Layers of {name}", _STYLE, parts)


def _stability(figures: Mapping[str, Any]) -> str:
    halves = figures.get("rank_correlation_of_halves")
    data = escape(str(figures.get("probe", {}).get("data", "")))
    sentence = f"<p>Data: {data}."
    if halves is not None:
        sentence += f" Rank correlation between the two halves of the samples: {halves:.3f}."
    return sentence + "</p>"


def _check_part(plan: Plan, picture: bytes) -> str:
    check = plan.figures["check"]
    named = [("plan", trial) for trial in check["trials"]] + [("control", check["control"])]
    rows = [score_row("dense", check["dense"], None)]
    rows += [
        score_row(f"{name}, {len(trial['layers'])} layers", trial["score"], trial["difference"])
        for name, trial in named
    ]
    head = "<tr><th></th><th>right, %</th><th>against dense, points (95%)</th></tr>"
    caption = (
        f"{check['samples']} samples, the same for every row. The control makes the most important "
        "layers triangle layers: a check that cannot see the harm in that sees nothing."
    )
    return (
        f"<p>Verdict: <b>{escape(check['verdict'])}</b></p>"
        f"<table>{head}{''.join(rows)}</table>{picture_part(picture, caption)}"
    )
