"""Rules of what follows the parser: shapes, types of a chip, files, attention plugins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

import onnx
from onnx import TensorProto
from trianglemix.exporter.targets.ascend.lint_model import (
    LintModel,
    Place,
    Severity,
    place_of,
    rule,
)

_PROTOBUF_LIMIT: Final = 2**31 - 1
_SHARED_FACTS: Final = "docs/ascend.md"


@rule("dynamic-shape", Severity.ERROR, "static route: atc's --input_shape")
def _dynamic_input(model: LintModel) -> Iterator[Place]:
    for value in model.graph.input:
        info = model.infos[value.name]
        if not info.is_static:
            dims = "unknown rank" if info.dims is None else list(info.dims)
            yield value.name, f"shape {dims} is not static; give every size a number"


@rule("dynamic-value", Severity.ERROR, "static route: every inner shape known")
def _dynamic_value(model: LintModel) -> Iterator[Place]:
    """Only where unknown sizes begin: all inputs of the node are static, an output is not."""
    if any(not model.infos[value.name].is_static for value in model.graph.input):
        return
    for node in model.graph.node:
        known = [model.infos.get(name) for name in node.input if name]
        fresh = [name for name in node.output if name]
        if not all(info and info.is_static for info in known):
            continue
        for name in fresh:
            info = model.infos.get(name)
            if info is None or not info.is_static:
                yield place_of(node), f"the shape of {name} depends on values; fold it"


@rule("zero-size", Severity.ERROR, "static route: a tensor holds something")
def _zero_size(model: LintModel) -> Iterator[Place]:
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name, info in model.infos.items():
        if info.dims and 0 in info.dims and name in names:
            yield name, f"shape {list(info.dims)} has no elements; use a static cache"


@rule("chip-type", Severity.ERROR, "CANN's platform files: no bf16 on 310P")
def _chip_type(model: LintModel) -> Iterator[Place]:
    if model.soc is None or model.soc.has_bfloat16:
        return
    for name, info in model.infos.items():
        if info.elem_type == TensorProto.BFLOAT16:
            yield name, f"bfloat16, which {model.soc.name} does not have; export in float16"
            return


@rule("int64-input", Severity.NOTE, "CANN documents: FP32, FP16, UINT8 inputs")
def _wide_input(model: LintModel) -> Iterator[Place]:
    for value in model.graph.input:
        if model.infos[value.name].elem_type == TensorProto.INT64:
            yield value.name, "int64 input: common in practice, but the documents do not list it"


@rule("protobuf-limit", Severity.ERROR, "protobuf: 2 GiB in a message")
def _protobuf_limit(model: LintModel) -> Iterator[Place]:
    size = model.path.stat().st_size if model.path else model.proto.ByteSize()
    if size > _PROTOBUF_LIMIT:
        yield (
            model.graph.name or "graph",
            f"{size / 2**30:.1f} GiB in one file, protobuf ends at 2 GiB; use external data",
        )


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return {}
    return {entry.key: entry.value for entry in tensor.external_data}


@rule("external-data", Severity.ERROR, "CANN's open parser: SetExternalPath")
def _external_place(model: LintModel) -> Iterator[Place]:
    for tensor in model.tensors():
        location = _external(tensor).get("location")
        if location is None:
            continue
        path = PurePosixPath(location)
        if path.is_absolute() or ".." in path.parts:
            yield tensor.name, f"data at {location}, outside the model's folder; move it inside"
        elif model.path is not None and not (model.path.parent / location).is_file():
            yield tensor.name, f"data file {location} is missing beside the model"


@rule(
    "external-offset",
    Severity.WARNING,
    "CANN's open parser, onnx_file_constant_parser.cc before 2025",
)
def _external_offset(model: LintModel) -> Iterator[Place]:
    """Says it once: a file shared by all tensors breaks it for nearly all of them."""
    for tensor in model.tensors():
        if int(_external(tensor).get("offset", "0")):
            yield (
                tensor.name,
                "data begins inside a shared file: older parsers multiply the offset by 4096 and "
                "read other weights; give each tensor its own file",
            )
            return


@rule("quadratic", Severity.ERROR, "no tensor has two axes of prompt or cache")
def _quadratic(model: LintModel) -> Iterator[Place]:
    if model.length_axes is None:
        return
    for name, info in model.infos.items():
        if model.length_axes.count_in(info.dims or ()) > 1:
            yield (
                name,
                f"shape {list(info.dims or ())} is square in the length (axes of "
                f"{model.length_axes.shortest} and more)",
            )


@rule("flash-attention", Severity.ERROR, "plugin of NPUFlashAttention")
def _flash_attention(model: LintModel) -> Iterator[Place]:
    for node in model.nodes:
        if node.op_type == "NPUFlashAttention":
            yield place_of(node), "NPUFlashAttention allocates B*H*S*S bits; use another operator"


@rule("prompt-flash-mask", Severity.ERROR, "plugin of NPUPromptFlashAttention")
def _prompt_flash_mask(model: LintModel) -> Iterator[Place]:
    for node in model.nodes:
        shift, mask = [*node.input, "", "", "", "", ""][3:5]
        if node.op_type == "NPUPromptFlashAttention" and mask and not shift:
            yield place_of(node), "a mask without a connected pse_shift is not read"
