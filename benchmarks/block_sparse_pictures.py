"""Draws the pictures of docs/block_sparse.md from the figures in benchmarks/results.

python -m benchmarks.block_sparse_pictures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from trianglemix.analysis.plots import new_figure, png_of

from benchmarks.block_sparse_peers import EARLIER

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
IMAGES: Final = ROOT / "docs" / "images"
DENSITY: Final = 0.15
RULE: Final = "8 exact rows"
OTHERS: Final = (  # beginning of the rule's name, marker, colour
    ("true mass", "*", "#777777"),
    ("pooled keys", "s", "#4878a8"),
    ("two bands pooled", "^", "#6a9f58"),
    ("antidiagonal sums", "v", "#8a6fb0"),
    ("random blocks", "x", "#111111"),
)
LINES: Final = {  # peer: name, colour, width; the first ones are drawn below
    "cuDNN": ("cuDNN, dense", "#777777", 1.4),
    "minference": ("MInference's vertical-slash", "#8a6fb0", 1.4),
    "flashinfer variable": ("FlashInfer, variable blocks", "#6a9f58", 1.4),
    "flex": ("flex_attention, compiled", "#4878a8", 3.0),
    "cudnn-frontend 128": ("cuDNN-frontend, blocks of 128", "#c9a227", 1.2),
    "this operator": ("this operator, choice included", "#d1603d", 2.6),
}


def peers() -> list[dict[str, Any]]:
    """The lines of `benchmarks.block_sparse_peers`."""
    text = (RESULTS / "block_sparse_peers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def time_picture(lines: list[dict[str, Any]]) -> bytes:
    """PNG: milliseconds against the prompt's length, both on a log scale."""
    figure, axes = new_figure(6.8, 4.2)
    for peer, (name, colour, width) in LINES.items():
        mine = [x for x in lines if x["peer"] == peer and x["wanted"] == DENSITY]
        mine.sort(key=lambda x: x["tokens"])
        tokens, times = [x["tokens"] for x in mine], [x["ms"] for x in mine]
        axes.plot(tokens, times, marker="o", ms=4, label=name, color=colour, lw=width)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({x["tokens"] for x in lines})
    axes.set_xticks(lengths, [f"{x // 1024}K" for x in lengths])
    axes.set_xlabel(f"tokens (one H100, bfloat16, 32 heads, 8 KV heads, D 128, density {DENSITY})")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)
    return png_of(figure)


def answers_picture(shipped: dict[str, Any]) -> bytes:
    """PNG: points against the triangle layers alone, by rule and kept share of the blocks."""
    figure, axes = new_figure(8.2, 4.2)
    axes.axhline(0, color="#777777", lw=1)
    ours = [(density, points, half) for name, _, points, half, density, *_ in EARLIER
            if name.startswith(RULE)]  # fmt: skip
    draw_points(axes, ours, ("o", "#d1603d"), "this rule: mass .8, .9, .95 (ten layers)")
    gain = {k: 100 * x for k, x in shipped["block-sparse"]["against_triangle"].items()}
    half = (gain["high"] - gain["low"]) / 2
    found = [(shipped["block-sparse"]["density"], gain["mean"], half)]
    draw_points(axes, found, ("D", "#8c2d04"), "this rule: the shipped plan (nine layers)")
    for name, marker, colour in OTHERS:
        found = [(density, points, half) for rule, _, points, half, density, *_ in EARLIER
                 if rule.startswith(name)]  # fmt: skip
        draw_points(axes, found, (marker, colour), name)
    axes.set_xlabel("kept share of the blocks")
    axes.set_ylabel("points against the triangle layers alone")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return png_of(figure)


def draw_points(
    axes: Any, points: list[tuple[float, float, float]], look: tuple[str, str], name: str
) -> None:
    """Points (kept share, gain, half of its 95 % interval) with a marker and a colour."""
    density, gain, half = zip(*points, strict=True)
    axes.errorbar(
        density, gain, half, fmt=look[0], color=look[1], ms=6, capsize=3, lw=1.2, label=name
    )


def main() -> None:
    """Writes both pictures."""
    (IMAGES / "block-sparse-time.png").write_bytes(time_picture(peers()))
    answers = json.loads((RESULTS / "block_sparse_answers.json").read_text(encoding="utf-8"))
    shipped = answers["figures"]["retrieval of the shipped plan, 8000"]["all"]["variants"]
    (IMAGES / "block-sparse-answers.png").write_bytes(answers_picture(shipped))


if __name__ == "__main__":
    main()
