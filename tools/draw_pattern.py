"""Draws docs/pattern.svg, the picture of the pattern in the README, from the predicate itself."""

from __future__ import annotations

from pathlib import Path

from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep

TOKENS, CELL, GAP, TOP = 44, 7, 60, 34
PATTERN = TrianglePattern(num_sink_tokens=3, sliding_window_size=7, num_last_tokens=5)
COLOURS = {"sink": "#2563eb", "window": "#38a3a5", "last": "#f59e0b", "skipped": "#e5e7eb"}
LABELS = {
    "sink": "sink tokens",
    "window": "sliding window",
    "last": "dense last rows",
    "skipped": "Middle: skipped",
}


def section(row: int, column: int, pattern: TrianglePattern) -> str:
    """Which part of the pattern a causal (row, column) pair belongs to."""
    if not keep(row, column, pattern, TOKENS):
        return "skipped"
    if column < pattern.num_sink_tokens:
        return "sink"
    return "window" if pattern.is_dense or row - column < pattern.sliding_window_size else "last"


def panel(pattern: TrianglePattern, left: int, title: str) -> list[str]:
    """The causal half of one attention matrix."""
    middle = left + TOKENS * CELL // 2
    lines = [f'<text x="{middle}" y="{TOP - 14}" text-anchor="middle" class="title">{title}</text>']
    for row in range(TOKENS):
        for column in range(row + 1):
            colour = COLOURS[section(row, column, pattern)]
            x, y = left + column * CELL, TOP + row * CELL
            lines.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>'
            )
    return lines


def legend(left: int) -> list[str]:
    """Colours and their names, in the empty upper half of a panel."""
    lines = []
    for index, (name, label) in enumerate(LABELS.items()):
        y = TOP + 8 + index * 20
        lines.append(f'<rect x="{left}" y="{y}" width="12" height="12" fill="{COLOURS[name]}"/>')
        lines.append(f'<text x="{left + 18}" y="{y + 11}">{label}</text>')
    return lines


def main() -> None:
    side = TOKENS * CELL
    width, height = 2 * side + GAP + 20, side + TOP + 34
    style = "text{font:13px sans-serif;fill:#374151}.title{font-weight:600}"
    right = 10 + side + GAP
    body = [
        *panel(DENSE_PATTERN, 10, "dense layer: O(N²)"),
        *panel(PATTERN, right, "triangle layer: O(N)"),
        *legend(right + side - 150),
        f'<text x="10" y="{TOP + side + 20}">row: query position, column: key position</text>',
    ]
    picture = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><rect width="100%" height="100%" fill="white"/>'
        f"<style>{style}</style>{''.join(body)}</svg>\n"
    )
    Path(__file__).parents[1].joinpath("docs", "pattern.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
