"""ONNX Runtime, imported only when a graph is run."""

from __future__ import annotations

from typing import Any

from trianglemix.exporter.errors import ExportError


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime is not installed, and attention is checked with it; "
            "pip install 'trianglemix[cpu]' (or [gpu])"
        ) from error
    return onnxruntime
