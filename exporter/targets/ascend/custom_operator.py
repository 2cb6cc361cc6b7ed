"""The route with a custom operator: what has to be installed, and which chips it is written for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets.ascend.soc import Soc

OPERATOR: Final = f"{contract.DOMAIN}::{contract.OP_VERSION}::{OP_TYPE}"
CUSTOM_OPERATOR: Final = (
    f"{OPERATOR}: install the operator package built from custom_ops/ascend before atc runs and "
    "wherever the models run; never compiled by CANN"
)
INPUTS: Final = contract.INPUTS[: contract.INPUTS.index("first_valid") + 1]
"""What the package's operator reads, all of it connected."""
ATTRIBUTES: Final = (
    contract.ATTR_NUM_HEADS,
    contract.ATTR_KV_NUM_HEADS,
    contract.ATTR_SCALE,
    contract.ATTR_SOFTCAP,
    contract.ATTR_SINK,
    contract.ATTR_WINDOW,
    contract.ATTR_LAST,
)
TYPES: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_HEAD_SIZE_STEP: Final = 16
_CHIPS: Final = ("Ascend910B", "Ascend910_93")


def runs_custom_operator(soc: Soc) -> bool:
    """Whether the operator package is written for the chip."""
    return soc.name.startswith(_CHIPS)


def check_custom(soc: Soc, layers: Iterable[tuple[ir.DataType, AttentionShape]]) -> None:
    """Raises ExportError for a chip, a type or head sizes that the package is not written for."""
    if not runs_custom_operator(soc):
        raise ExportError(
            f"--lowering custom is for {' and '.join(f'{chip}*' for chip in _CHIPS)}, which its "
            f"operator package is written for, not for {soc.name}; use --lowering block there"
        )
    for dtype, shape in layers:
        if dtype not in TYPES:
            raise ExportError(
                f"--lowering custom takes float16 and bfloat16, but this model's attention is in "
                f"{dtype.numpy()}; export a float16 model (a Hugging Face folder with --dtype "
                "float16), or use --lowering block"
            )
        for size in (shape.head_size, shape.value_head_size):
            if size % _HEAD_SIZE_STEP:
                raise ExportError(
                    f"--lowering custom takes head sizes that are multiples of {_HEAD_SIZE_STEP}, "
                    f"but this model's is {size}; use --lowering block"
                )
