"""Makes an ONNX file of whatever the user gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from trianglemix.exporter.model_io import Source
from trianglemix.exporter.target import Target

WORK_FOLDER: Final = ".work"


def prepare_source(
    source: Source, target: Target, folder: Path, stage: Callable[[str], None]
) -> Source:
    """The source as an ONNX file: itself, or written to `folder/.work` from a Hugging Face folder.

    Raises:
        ExportError: torch or transformers is missing, or the folder cannot be read.
        RefusedError: a model whose attention cannot be exported.
    """
    if not source.is_huggingface:
        return source
    from trianglemix.exporter.huggingface import HuggingFaceOptions, export_huggingface

    work = folder / WORK_FOLDER
    work.mkdir()
    dtype = "float32" if target.name == "cpu" and _is_bfloat16(source.path) else "auto"
    options = HuggingFaceOptions(dtype=dtype, stage=stage)  # type: ignore[arg-type]
    path = export_huggingface(source.path, work, options)
    return replace(source, path=path, is_huggingface=False)


def _is_bfloat16(folder: Path) -> bool:
    """ONNX Runtime's CPU provider computes nothing in bfloat16."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
