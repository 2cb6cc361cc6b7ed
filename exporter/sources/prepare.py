"""Makes an ONNX file of whatever the user gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import Dtype, ExportOptions
from trianglemix.exporter.sources.find import Source
from trianglemix.exporter.targets.ascend.soc import find_soc

WORK_FOLDER: Final = ".work"


def prepare_source(
    source: Source, options: ExportOptions, folder: Path, stage: Callable[[str], None]
) -> Source:
    """The source as an ONNX file: itself, or written to `folder/.work` from a Hugging Face folder.

    Raises:
        ExportError: torch or transformers is missing, the folder cannot be read, or its type
            does not fit the chip.
        RefusedError: a model whose attention cannot be exported.
        WeightsError: weights that are not whole, or not those of the configuration.
    """
    dtype = _dtype(source, options)
    if not source.is_huggingface:
        return source
    from trianglemix.exporter.sources.huggingface.export import (
        HuggingFaceOptions,
        export_huggingface,
    )

    work = folder / WORK_FOLDER
    work.mkdir()
    warnings: list[str] = []
    given = HuggingFaceOptions(dtype=dtype, stage=stage, warn=warnings.append)
    path = export_huggingface(source.path, work, given)
    return replace(source, path=path, is_huggingface=False, warnings=tuple(warnings))


def _dtype(source: Source, options: ExportOptions) -> Dtype:
    """What the weights of a Hugging Face folder become; "auto" keeps their type."""
    request = options.ascend
    if request is not None and request.dtype != "auto":
        if not source.is_huggingface:
            raise ExportError(
                f"--dtype {request.dtype} is for a Hugging Face folder; {source.path} keeps its "
                "types: leave --dtype out, or export the folder that the file was made from"
            )
        return request.dtype
    if not source.is_huggingface or not _is_bfloat16(source.path):
        return "auto"
    if request is not None and not find_soc(request.soc).has_bfloat16:
        raise ExportError(
            f"the weights in {source.path} are bfloat16, which {request.soc} does not have; add "
            "--dtype float16 (a weight that float16 cannot hold is then refused by its name)"
        )
    return "float32" if options.target == "cpu" else "auto"


def _is_bfloat16(folder: Path) -> bool:
    """ONNX Runtime's CPU provider computes nothing in bfloat16."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
