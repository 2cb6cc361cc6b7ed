"""The section of an analysis' page on block-sparse layers, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

from trianglemix.analysis.block_plots import density_by_length, layer_shares
from trianglemix.analysis.page_parts import picture_part, score_row
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan

MEASURED: Final = "by_length_layer_and_mass"
"""The section's figures that pictures are made of; a section written by hand has none."""


def block_pictures(section: BlockSparsePlan) -> dict[str, bytes]:
    """PNG files by name: `blocks` and, for more than one prompt length, `lengths`.

    The section's figures are those of `block_command`.
    """
    measured = section.figures[MEASURED]
    longest = measured[max(measured, key=int)]
    pictures = {"blocks": layer_shares(longest, f"{section.rule.mass:g}", section.layers)}
    if len(measured) > 1:
        pictures["lengths"] = density_by_length(measured, section.layers)
    return pictures


def block_parts(section: BlockSparsePlan, pictures: Mapping[str, bytes]) -> list[str]:
    """The HTML, part by part."""
    figures, rule = section.figures, section.rule
    longest = max(map(int, figures[MEASURED]))
    parts = [
        "<h2>Block-sparse layers</h2>",
        f"<p><code>--block-sparse-layers {section.layer_list} --mass {rule.mass:g}"
        f"</code> ({len(section.layers)} layers; prompts of up to {rule.min_length} tokens stay "
        f"dense). {escape(section.origin)}.</p>",
        picture_part(
            pictures["blocks"],
            f"Prompts of {longest} tokens, mass {rule.mass:g}: the share of causal blocks that is "
            "kept, and the share of each tile's true attention that lies in them. A dash shows "
            "what would be kept if every row's attention were known.",
        ),
        _left_out(figures["left_out"]),
        f"<p>Data: {escape('; '.join(figures['data']))}.</p>",
    ]
    if "lengths" in pictures:
        caption = "Mean over the block-sparse layers: the longer a prompt, the less is kept."
        parts.append(picture_part(pictures["lengths"], caption))
    if figures.get("check"):
        parts += ["<h2>Block-sparse layers on a task</h2>", _check(figures["check"])]
    return parts


def _left_out(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return "<p>Every other layer that sees the whole prompt is block-sparse.</p>"
    lines = "".join(f"<li>Layer {layer} {escape(why)}</li>" for layer, why in reasons.items())
    return f"<p>Dense stay:</p><ul>{lines}</ul>"


def _check(check: Mapping[str, Any]) -> str:
    rows = [score_row("triangle layers alone", check["plan"], None)]
    for name, trial in (("with block-sparse", check["rule"]), ("random blocks", check["control"])):
        rows.append(score_row(name, trial["score"], trial["difference"]))
    head = "<tr><th></th><th>right, %</th><th>against the plan alone, points (95%)</th></tr>"
    return (
        f"<p>Verdict: <b>{escape(check['verdict'])}</b> ({check['samples']} samples, the same for "
        f"every row; random blocks are as many as the rule keeps).</p><table>{head}"
        f"{''.join(rows)}</table>"
    )
