"""HTML of what the sections of an analysis' page share: a picture, a line of scores."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape


def score_row(name: str, score: Mapping[str, float], difference: Mapping[str, float] | None) -> str:
    """A table's row: percent right, and the points of difference with their interval."""
    change = ""
    if difference:
        mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
        change = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"<tr><td>{name}</td><td>{100 * score['mean']:.1f}</td><td>{change}</td></tr>"


def picture_part(png: bytes, caption: str) -> str:
    """The picture inside the page, with a caption of plain text."""
    data = b64encode(png).decode("ascii")
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
