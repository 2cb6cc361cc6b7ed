"""Makes an ONNX file of whatever the user gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import Dtype, ExportOptions
from trianglemix.exporter.sources.find_source import Source
from trianglemix.hf.weight_files import read_object

WORK_FOLDER: Final = ".work"


def prepare_source(
    source: Source,
    options: ExportOptions,
    of_bfloat16: Callable[[ExportOptions], Dtype],
    folder: Path,
    stage: Callable[[str], None],
) -> Source:
    """The source as an ONNX file: itself, or written to `folder/.work` from a Hugging Face folder.

    `of_bfloat16` says what such a folder's bfloat16 weights become (`Target.weights_dtype`).

    Raises:
        ExportError: torch or transformers is missing, the folder cannot be read, or its type
            does not fit the device.
        RefusedError: a model whose attention cannot be exported.
        WeightsError: weights that are not whole, or not those of the configuration.
    """
    dtype = _dtype(source, options, of_bfloat16)
    if not source.is_huggingface:
        return source
    from trianglemix.exporter.sources.huggingface.run_worker import (
        HuggingFaceOptions,
        export_huggingface,
    )

    work = folder / WORK_FOLDER
    work.mkdir()
    warnings: list[str] = []
    given = HuggingFaceOptions(dtype=dtype, stage=stage, warn=warnings.append)
    path = export_huggingface(source.path, work, given)
    return replace(source, path=path, is_huggingface=False, warnings=tuple(warnings))


def _dtype(
    source: Source, options: ExportOptions, of_bfloat16: Callable[[ExportOptions], Dtype]
) -> Dtype:
    """What the weights of a Hugging Face folder become; "auto" keeps their type."""
    if options.dtype != "auto":
        if not source.is_huggingface:
            raise ExportError(
                f"--dtype {options.dtype} is for a Hugging Face folder; {source.path} keeps its "
                "types: leave --dtype out, or export the folder that the file was made from"
            )
        return options.dtype
    if not source.is_huggingface:
        return "auto"
    config = read_object(source.path / "config.json")
    is_bfloat16 = "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    return of_bfloat16(options) if is_bfloat16 else "auto"
