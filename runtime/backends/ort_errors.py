"""ONNX Runtime's exceptions, which share no base class, as one tuple and one line of text."""

from __future__ import annotations

from typing import Final

from onnxruntime.capi import onnxruntime_pybind11_state as _native
from trianglemix.runtime.errors import ExecutionError

ORT_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(
        value
        for value in vars(_native).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
    RuntimeError,
    ValueError,
)


def execution_error(what: str, error: Exception) -> ExecutionError:
    """`what`, with ONNX Runtime's reason folded into one line."""
    return ExecutionError(f"{what}: {' '.join(str(error).split())}")
