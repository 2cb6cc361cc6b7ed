"""What of `Attention` the installed ONNX Runtime does not compute as it is specified.

That is stated by the specification, and taken off the piece that is run: what a source means must
not depend on the version that measures it.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.cutout import CutOut
from trianglemix.exporter.graph.ort import import_onnxruntime
from trianglemix.exporter.graph.walk import is_op
from trianglemix.exporter.patterns._node_mask import LEFT_WINDOW, RIGHT_WINDOW, Bounds

_WINDOWS_SINCE: Final = (1, 32)  # before, the attributes of opset 25 are refused
_SOFTCAP_SINCE: Final = (1, 27)  # before, it is applied after the mask, and hidden keys count


def leave_unspecified_out(cut: CutOut, bounds: Bounds, softcap: float) -> tuple[Bounds, float]:
    """Changes the piece's `Attention`; returns the bounds and the softcap that it then has."""
    installed = tuple(int(x) for x in import_onnxruntime().__version__.split(".")[:2])
    for node in cut.model.graph:
        if not is_op(node, "Attention"):
            continue
        if installed < _WINDOWS_SINCE and {LEFT_WINDOW, RIGHT_WINDOW} & set(node.attributes):
            node.attributes.pop(LEFT_WINDOW, None)
            node.attributes.pop(RIGHT_WINDOW, None)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", int(bounds.right == 0))
            bounds = Bounds(right=bounds.right)
        if installed < _SOFTCAP_SINCE:
            node.attributes.pop("softcap", None)
            softcap = 0.0
    return bounds, softcap
