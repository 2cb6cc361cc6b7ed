"""What a source with triangle layers of its own drops, and up to which length it drops nothing."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from trianglemix.exporter.graph.triangle_node import LayerKind, TriangleNode


def source_limit(path: Path) -> tuple[int | None, list[str]]:
    """The longest such prompt (tokens), and a note; None and no note where there is no limit.

    A source may be an export itself. Another choice of layers, or its dense twin, gives its
    logits up to this length only.
    """
    limits = [
        limit
        for node in TriangleNode.all_of(ir.load(path).graph)
        if node.kind is LayerKind.TRIANGLE and (limit := node.pattern.exact_length) is not None
    ]
    if not limits:
        return None, []
    note = (
        "verify: the source drops keys itself in some layers; compared where it drops nothing, "
        f"up to {min(limits)} tokens"
    )
    return min(limits), [note]
