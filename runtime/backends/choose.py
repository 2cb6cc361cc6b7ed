"""Chooses what runs a folder: ONNX Runtime with the operator, or static graphs on CPU or NPU."""

from __future__ import annotations

from dataclasses import dataclass

from trianglemix.manifest.manifest import RUNS
from trianglemix.runtime.backends.backend import Backend
from trianglemix.runtime.errors import FolderError, MissingPackageError, ProviderError
from trianglemix.runtime.model_folder import ModelFolder


@dataclass(frozen=True)
class BackendChoice:
    """What the user asked for; `threads` None leaves their number to ONNX Runtime."""

    provider: str = "auto"
    allow_fallback: bool = False
    threads: int | None = None


def choose_backend(folder: ModelFolder, choice: BackendChoice) -> Backend:
    """Loads the folder's model where it was asked for.

    Raises:
        TriangleMixError: the provider does not fit the folder, or cannot be used here.
    """
    _check_runs(folder)
    static = folder.manifest.static is not None
    if choice.provider == "npu":
        if not static:
            raise ProviderError(
                "provider npu runs folders that were exported with --target ascend; export again"
            )
        from trianglemix.runtime.backends.om import open_om_backend

        return open_om_backend(folder)
    if static and choice.provider not in ("auto", "cpu"):
        raise ProviderError(
            f"provider is {choice.provider}, but an export for Ascend runs on cpu or npu"
        )
    try:
        if static:
            from trianglemix.runtime.backends.ort_static import open_static_backend

            return open_static_backend(folder, choice.threads)
        from trianglemix.runtime.backends.ort import OrtSettings, open_backend

        return open_backend(
            folder, OrtSettings(choice.provider, choice.allow_fallback, choice.threads)
        )
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("onnxruntime"):
            raise
        raise MissingPackageError(
            "onnxruntime is not installed; pip install 'trianglemix[cpu]' for the CPU, or "
            "'trianglemix[gpu]' for CUDA (one of the two, never both)"
        ) from error


def _check_runs(folder: ModelFolder) -> None:
    reason = folder.manifest.runtime
    if reason != RUNS:
        raise FolderError(
            f"{folder.path} holds a model that this runtime cannot run: {reason}; feed it yourself "
            "in ONNX Runtime, with the library that trianglemix.library_path() names"
        )
