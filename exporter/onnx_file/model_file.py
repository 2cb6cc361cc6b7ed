"""Reads the source model's graph without its weights, and writes the exported model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.onnx_file.file_copy import Placed, place_file
from trianglemix.exporter.onnx_file.proto_size import (
    INLINE_DATA_FILE,
    check_proto_size,
    move_inline_weights,
    serialize,
)
from trianglemix.exporter.options import Weights

logger = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def load_model(path: Path) -> ir.Model:
    """The graph; external weights stay on disk.

    Raises:
        ExportError: not an ONNX file, one of more than 2 GiB, or external data that is missing,
            cut short, or outside the model's folder.
    """
    check_proto_size(path)
    try:
        model = ir.load(path)
    except DecodeError as error:
        raise ExportError(
            f"{path} is not a readable ONNX file (truncated or something else); export or "
            "download it again"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, ir.serde.SerdeError) as error:
        cause = error.__cause__ or error  # SerdeError's own text is the whole graph
        raise ExportError(f"{path} cannot be read as an ONNX model: {_line(cause)}") from error
    if not list(model.graph) and not model.graph.inputs:
        raise ExportError(f"{path} holds no graph; it is empty, cut off or not an ONNX model")
    for tensor in external_tensors(model):
        _check_external(tensor, path)
    return model


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Weights that lie outside the proto: of the graph, of branches and bodies, of functions."""
    graphs = [*model.graphs(), *(g for x in model.functions.values() for g in x.subgraphs())]
    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    for nodes in [*graphs, *model.functions.values()]:
        for node in nodes:
            yield from _external_attributes(node)


def _external_attributes(node: ir.Node) -> Iterator[ir.ExternalTensor]:
    """Tensors that a node holds itself, as a Constant does."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            tensors = [attribute.as_tensor()]
        elif attribute.type == ir.AttributeType.TENSORS:
            tensors = list(attribute.as_tensors())
        else:
            continue
        yield from (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def _check_external(tensor: ir.ExternalTensor, model: Path) -> None:
    """The rule is ONNX Runtime's: a link may lead into the folder where the model itself lies, or
    where the model's own link leads, as in a Hugging Face cache."""
    folder = model.parent
    location = PurePosixPath(tensor.location)
    what = f"external data {tensor.location} of {tensor.name}"
    if location.is_absolute() or ".." in location.parts:
        raise ExportError(f"{what} lies outside the model's folder {folder}; put it inside")
    file = folder / location
    homes = (folder.resolve(), model.resolve().parent)
    if not any(file.resolve().is_relative_to(home) for home in homes) and file.exists():
        raise ExportError(f"{what} is a link that leads outside {folder}; put the file inside")
    if not file.is_file():
        raise ExportError(f"{what} is missing in {folder}; put it beside the model")
    end = (tensor.offset or 0) + (tensor.length or 0)
    size = file.stat().st_size
    if end > size:
        raise ExportError(
            f"{what} ends at byte {end}, but the file has {size} bytes; it is cut off"
        )


def save_model(
    model: ir.Model, source_folder: Path, folder: Path, weights: Weights, progress: Progress
) -> list[str]:
    """Writes `folder/model.onnx` and its data files; returns notes for the report.

    External files keep their names, as files of their own or as hard links of the source's
    (`weights`). Weights that were inside the proto stay there if they are few, else they go to
    one data file.

    Raises:
        ExportError: the disk is full, or a file cannot be written.
    """
    notes = []
    try:
        notes += _place_external(model, source_folder, folder, weights, progress)
        notes += move_inline_weights(model, folder)
        (folder / MODEL_FILE).write_bytes(serialize(model))
    except OSError as error:
        raise ExportError(f"the model cannot be written to {folder}: {error}") from error
    except ValueError as error:
        raise ExportError(f"the model cannot be written: {_line(error)}") from error
    return notes


def _place_external(
    model: ir.Model, source: Path, folder: Path, weights: Weights, progress: Progress
) -> list[str]:
    locations = sorted({str(PurePosixPath(t.location)) for t in external_tensors(model)})
    taken = {MODEL_FILE, INLINE_DATA_FILE, "manifest.json", "export_report.json"}
    sizes = {location: (source / location).stat().st_size for location in locations}
    total, done = sum(sizes.values()), 0
    placed: dict[Placed, int] = {"linked": 0, "cloned": 0, "copied": 0}
    for location in locations:
        if location in taken:
            raise ExportError(f"the model's data file is named {location}, as one of the output's")
        how = place_file(
            source / location,
            folder / location,
            link=weights == "link",
            progress=lambda part, before=done: progress(before + part, total),  # type: ignore[misc]
        )
        placed[how] += sizes[location]
        done += sizes[location]
        progress(done, total)
    return [_note(how, size >> 20, weights) for how, size in placed.items() if size]


def _note(how: Placed, mebibytes: int, weights: Weights) -> str:
    """What the user should know of data files that were placed so."""
    if how == "linked":
        return (
            f"weights linked ({mebibytes} MiB shared with the source): ONNX Runtime reads them; "
            "Python's onnx and onnx_ir refuse files with several hard links, the source's as well "
            "while both exist"
        )
    if weights == "link":
        return f"weights {how} ({mebibytes} MiB): no hard links here (another file system?)"
    if how == "cloned":
        return f"weights cloned ({mebibytes} MiB, blocks shared with the source's)"
    return f"weights copied ({mebibytes} MiB); --weights link shares the source's files instead"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
