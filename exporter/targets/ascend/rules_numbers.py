"""Rules of float16: constants and masks that overflow, on purpose or by the default precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto
from trianglemix.exporter.targets.ascend.lint_model import (
    LintModel,
    Place,
    Severity,
    place_of,
    rule,
)

HALF_MAX: Final = 65504.0
_MASK_LEVEL: Final = -1e4
_MASK_STEPS: Final = frozenset(
    {"Cast", "Concat", "Expand", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Transpose"}
    | {"Unsqueeze", "Where"}
)
_MASK_DEPTH: Final = 8


@rule("half-overflow", Severity.ERROR, "float16 ends at 65504")
def _overflow(model: LintModel) -> Iterator[Place]:
    """In a float16 model a constant that float16 cannot hold, whatever type it is stored in."""
    if not model.is_half:
        return
    for name, array in model.constants.items():
        worst = float(np.max(np.abs(array), initial=0.0))
        if not np.isfinite(worst):
            yield name, "holds an infinity or NaN; the lowest float16 number is -65504"
        elif worst > HALF_MAX:
            yield name, f"holds {worst:.4g}, which float16 cannot; use -65504 where a mask needs it"


@rule("infinity", Severity.WARNING, "softmax of a row of -inf")
def _infinite(model: LintModel) -> Iterator[Place]:
    if model.is_half:
        return
    for name, array in model.constants.items():
        if not np.isfinite(array).all():
            yield name, "holds an infinity or NaN: a row that is masked as a whole gives NaN"


@rule("added-mask", Severity.WARNING, "float16 ends at 65504; atc's default precision")
def _added_mask(model: LintModel) -> Iterator[Place]:
    """Float32 models too: without --precision_mode_v2=origin atc computes them in float16."""
    for node in model.nodes:
        if node.op_type != "Softmax" or not node.input:
            continue
        added = model.producers.get(node.input[0])
        if added is None or added.op_type != "Add":
            continue
        if any(_is_mask(model, name, _MASK_DEPTH) for name in added.input):
            yield place_of(added), "score + mask overflows float16; use Where(keep, score, floor)"


def _is_mask(model: LintModel, name: str, depth: int) -> bool:
    """Whether the value comes from a constant at or below -1e4 without leaving mask arithmetic."""
    if name in model.constants:
        return bool(np.min(model.constants[name], initial=0.0) <= _MASK_LEVEL)
    node: onnx.NodeProto | None = model.producers.get(name)
    if node is None or depth == 0 or node.op_type not in _MASK_STEPS:
        return False
    return any(_is_mask(model, operand, depth - 1) for operand in node.input)


@rule("half-softmax", Severity.WARNING, "sums over many keys need float32")
def _half_softmax(model: LintModel) -> Iterator[Place]:
    for node in model.nodes:
        info = model.infos.get(node.input[0]) if node.op_type == "Softmax" and node.input else None
        if info is not None and info.elem_type == TensorProto.FLOAT16:
            yield place_of(node), "softmax in float16; cast the scores to float32 before it"
