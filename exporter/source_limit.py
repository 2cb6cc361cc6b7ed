"""What a source with triangle layers of its own drops, and up to which length it drops nothing."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from trianglemix.custom_ops.contract import ATTR_LAST, ATTR_SINK, ATTR_WINDOW, TrianglePattern
from trianglemix.exporter.insert import is_triangle_attention


def source_limit(path: Path) -> tuple[int | None, list[str]]:
    """The longest such prompt (tokens), and a note; None and no note where there is no limit.

    A source may be an export itself. Another choice of layers, or its dense twin, gives its
    logits up to this length only.
    """
    limits = [
        limit
        for node in ir.load(path).graph
        if is_triangle_attention(node) and (limit := pattern_of(node).exact_length) is not None
    ]
    if not limits:
        return None, []
    note = (
        "verify: the source drops keys itself in some layers; compared where it drops nothing, "
        f"up to {min(limits)} tokens"
    )
    return min(limits), [note]


def pattern_of(node: ir.Node) -> TrianglePattern:
    """The pattern of a TriangleAttention node."""
    names = (ATTR_SINK, ATTR_WINDOW, ATTR_LAST)
    return TrianglePattern(
        *(
            node.attributes.get_int(name, default)
            for name, default in zip(names, TrianglePattern().as_attributes().values(), strict=True)
        )
    )
