"""Forms of an export that `--verify` runs: without dropping anything, or on the function body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from trianglemix.custom_ops.contract import DENSE_WINDOW
from trianglemix.exporter.graph.fold_rotation import UnfoldRotationPass
from trianglemix.exporter.graph.triangle_node import LayerKind, TriangleNode

_WINDOW = "sliding_window_size"


@contextmanager
def form_of(path: Path, *, dense: bool, canonical: bool) -> Iterator[Path]:
    """The export at `path`, or a copy of its graph beside the same weight files.

    `dense`: no triangle layer drops anything; layers that the source windows keep their window.
    `canonical`: as the operator's function body runs it.
    """
    model = ir.load(path)
    nodes = TriangleNode.all_of(model.graph)
    dropping = [node for node in nodes if dense and node.kind is LayerKind.TRIANGLE]
    folded = canonical and any(node.is_folded for node in nodes)
    if not dropping and not folded:
        yield path
        return
    for triangle in dropping:
        triangle.node.attributes.add(ir.AttrInt64(_WINDOW, DENSE_WINDOW))
    if folded:
        UnfoldRotationPass()(model)
    copy = path.with_name("verified_form.onnx")
    try:
        ir.save(model, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
