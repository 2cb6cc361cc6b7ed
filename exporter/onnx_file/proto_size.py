"""Keeps protos below the size that their format can hold: weights go to a data file in time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from trianglemix.exporter.errors import ExportError

MAX_PROTO_BYTES: Final = (1 << 31) - 1
"""Where the format ends: no protobuf library reads or writes a longer message."""
MAX_INLINE_BYTES: Final = 64 << 20
"""Weights that stay in the proto, in all. Far below the format's end, because ONNX Runtime holds a
proto twice while it loads one, and maps a data file instead."""
INLINE_DATA_FILE: Final = "model.onnx.inline.data"
_KEEP_INLINE_BYTES: Final = 1 << 10
_ALIGNMENT: Final = 4096


def check_proto_size(path: Path, limit: int = MAX_PROTO_BYTES) -> None:
    """Raises ExportError for a source file that is longer than a proto can be."""
    size = path.stat().st_size
    if size > limit:
        raise ExportError(
            f"{path} has {size} bytes in one proto, and the format ends at {limit}: ONNX Runtime "
            "does not load it either; write the model again with its weights as external data "
            "(torch.onnx.export(..., external_data=True), onnx.save(..., "
            "save_as_external_data=True))"
        )


def move_inline_weights(model: ir.Model, folder: Path, limit: int = MAX_INLINE_BYTES) -> list[str]:
    """Moves the proto's weights to one data file in `folder` if they have more than `limit` bytes.

    Tensors of up to 1 KiB stay where they are. Returns notes for the report.

    Raises:
        OSError: the file cannot be written.
    """
    inline = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes > _KEEP_INLINE_BYTES
    ]
    total = sum(value.const_value.nbytes for value in inline if value.const_value is not None)
    if total <= limit:
        return []
    with (folder / INLINE_DATA_FILE).open("wb") as file:
        for value in inline:
            tensor = value.const_value
            assert tensor is not None
            file.seek(-file.tell() % _ALIGNMENT, 1)
            offset = file.tell()
            file.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                INLINE_DATA_FILE, offset, tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=folder,
            )  # fmt: skip
    return [f"weights of the proto ({total >> 20} MiB) moved to {INLINE_DATA_FILE}"]


def serialize(model: ir.Model, limit: int = MAX_PROTO_BYTES) -> bytes:
    """The model's proto, the same bytes every time.

    Raises:
        ExportError: it would be longer than a proto can be.
    """
    proto: onnx.ModelProto = ir.to_proto(model)
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
    except EncodeError as error:  # protobuf's own limit
        raise _too_long(f"more than {MAX_PROTO_BYTES}", limit) from error
    if len(data) > limit:
        raise _too_long(str(len(data)), limit)
    return data


def _too_long(size: str, limit: int) -> ExportError:
    return ExportError(
        f"the exported model would have {size} bytes in one proto, and the format ends at {limit}; "
        "write the source again with its weights as external data"
    )
