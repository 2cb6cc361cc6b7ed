"""Rules of the one custom operator that a graph may hold, TriangleAttention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.exporter.targets.ascend.custom_operator import (
    ATTRIBUTES,
    INPUTS,
    OPERATOR,
    TYPES,
    runs_custom_operator,
)
from trianglemix.exporter.targets.ascend.lint_model import (
    LintModel,
    Place,
    Severity,
    place_of,
    rule,
)

_PAST, _TOTAL = INPUTS.index("past_key"), INPUTS.index("total_sequence_length")
_SLOTS_AXIS: Final = 2
_SOURCE: Final = "custom_ops/ascend: the operator's definition"


def _nodes(model: LintModel) -> list[onnx.NodeProto]:
    return [
        node for node in model.nodes if (node.domain, node.op_type) == (contract.DOMAIN, OP_TYPE)
    ]


@rule("custom-operator", Severity.WARNING, "atc error E16002 without a plugin")
def _package(model: LintModel) -> Iterator[Place]:
    nodes = _nodes(model)
    if nodes:
        yield (
            place_of(nodes[0]),
            f"one of {len(nodes)} nodes that only the operator package of custom_ops/ascend reads; "
            "install it first; never compiled by CANN",
        )


@rule("custom-chip", Severity.ERROR, _SOURCE)
def _chip(model: LintModel) -> Iterator[Place]:
    nodes = _nodes(model)
    if nodes and model.soc is not None and not runs_custom_operator(model.soc):
        yield (
            place_of(nodes[0]),
            f"{OPERATOR} is not written for {model.soc.name}; use the block form",
        )


@rule("custom-a3", Severity.WARNING, "CANN's operator development guide, ONNX plugins")
def _doubtful_chip(model: LintModel) -> Iterator[Place]:
    nodes = _nodes(model)
    if nodes and model.soc is not None and model.soc.name.startswith("Ascend910_93"):
        yield (
            place_of(nodes[0]),
            f"CANN's guide says that atc does not call ONNX operators of one's own on "
            f"{model.soc.name}; nobody has tried: keep the block form at hand",
        )


@rule("custom-type", Severity.ERROR, _SOURCE)
def _type(model: LintModel) -> Iterator[Place]:
    for node in _nodes(model):
        info = model.infos.get(node.input[0]) if node.input else None
        if info is not None and ir.DataType(info.elem_type) not in TYPES:
            kind = ir.DataType(info.elem_type).numpy()
            yield place_of(node), f"its query is {kind}, the package has float16 and bfloat16"


@rule("custom-wiring", Severity.ERROR, _SOURCE)
def _wiring(model: LintModel) -> Iterator[Place]:
    """What the package's shape inference needs: every input, and a present as long as its past."""
    for node in _nodes(model):
        given = [name for name, value in zip(contract.INPUTS, node.input, strict=False) if value]
        if given != list(INPUTS):
            wrong = sorted(set(INPUTS) ^ set(given)) or given
            yield place_of(node), f"its inputs differ from the operator's nine: {', '.join(wrong)}"
            continue
        missing = set(ATTRIBUTES) - {attribute.name for attribute in node.attribute}
        if missing:
            yield place_of(node), f"attributes are missing: {', '.join(sorted(missing))}"
        past = model.infos.get(node.input[_PAST])
        total = _constant(model, node.input[_TOTAL])
        slots = past.dims[_SLOTS_AXIS] if past is not None and past.dims else None
        if total is None or total != slots:
            yield (
                place_of(node),
                f"total_sequence_length is {'not constant' if total is None else total}, the past "
                f"has {slots} slots; a static present needs them equal",
            )


def _constant(model: LintModel, name: str) -> int | None:
    for tensor in model.graph.initializer:
        if tensor.name == name and tensor.data_type == TensorProto.INT32:
            return int(np.ravel(numpy_helper.to_array(tensor))[0])
    return None
