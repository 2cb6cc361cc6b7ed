"""Brings a graph of a newer opset down to the last one that ATC reads, where nothing changes."""

from __future__ import annotations

from typing import Final

import onnx
import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.targets.ascend.rules_operators import OPSET_RANGE

LAST_OPSET: Final = OPSET_RANGE[-1]
_SAME_MEANING: Final = frozenset(
    {"Cast", "CastLike", "ConstantOfShape", "Equal", "Expand", "Flatten", "Identity", "IsInf"}
    | {"IsNaN", "Pad", "ReduceMax", "ReduceMin", "Reshape", "Shape", "Size", "Squeeze"}
    | {"Transpose", "Unsqueeze", "Where", "Cos", "Sin", "Tan", "Round", "Softplus", "Elu", "TopK"}
)
"""Operators whose versions after 18 only took in more types, or attributes that are refused below
unless they say what the older version did."""
_DEFAULTS: Final = {("Cast", "saturate"): 1, ("Cast", "round_mode"): "up"}


class LowerOpsetPass(ir.passes.InPlacePass):
    """Afterwards the model's opset is at most 18, and every node fits its schema there.

    Raises:
        RefusedError: a node means something that opset 18 cannot say; the node is named.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        version = model.graph.opset_imports[""]
        if version <= LAST_OPSET:
            return ir.passes.PassResult(model, False)
        for node in model.graph:
            if node.domain != contract.DOMAIN:
                _check(node, version)
        model.graph.opset_imports[""] = LAST_OPSET
        return ir.passes.PassResult(model, True)


def _check(node: ir.Node, version: int) -> None:
    new = onnx.defs.get_schema(node.op_type, version, "")
    try:
        old = onnx.defs.get_schema(node.op_type, LAST_OPSET, "")
    except onnx.defs.SchemaError:
        raise RefusedError(
            f"node {node.name} is {node.op_type}, which came after opset {LAST_OPSET}, the last "
            "that atc reads; export the model with an older opset"
        ) from None
    if new.since_version != old.since_version and node.op_type not in _SAME_MEANING:
        raise RefusedError(
            f"node {node.name} is {node.op_type} of opset {new.since_version}, whose meaning at "
            f"opset {LAST_OPSET} may differ; export the model with opset {LAST_OPSET}"
        )
    for name, attribute in list(node.attributes.items()):
        if name in old.attributes:
            continue
        if attribute.value != _DEFAULTS.get((node.op_type, name)):
            raise RefusedError(
                f"node {node.name} ({node.op_type}) has {name}={attribute.value}, which opset "
                f"{LAST_OPSET} cannot say; export the model with opset {LAST_OPSET}"
            )
        del node.attributes[name]
