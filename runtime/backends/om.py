"""Runs a folder's offline models (.om, which atc makes) on an Ascend NPU through ais_bench."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.static_graphs import StaticGraph
from trianglemix.runtime.backends.host_store import HostStore
from trianglemix.runtime.backends.static_cache import StaticBackend, StaticStore
from trianglemix.runtime.errors import ExecutionError, FolderError, MissingPackageError
from trianglemix.runtime.model_folder import ModelFolder

Array = NDArray[Any]
_MODULE: Final = "ais_bench.infer.interface"


class _InferSession(Protocol):
    """What is used of ais_bench's class."""

    def infer(self, feeds: list[Array], mode: str) -> list[Array]: ...


class OmDevice:
    """Offline models, each loaded when it is first needed.

    The cache lies in host memory, because that is what InferSession takes and gives: every call
    carries it to the device. Correct, not fast; see docs/ascend.md.
    """

    provider = "npu"

    def __init__(self, folder: ModelFolder, device_id: int) -> None:
        self._folder, self._device_id = folder, device_id
        self._open_session = _session_class()
        self._session = cache(self._open)

    def open_store(self) -> StaticStore:
        """See `StaticDevice.open_store`."""
        return HostStore(self._folder.manifest, self._execute)

    def _execute(self, graph: StaticGraph, inputs: list[Array]) -> Sequence[Array]:
        session = self._session(graph.file)
        contiguous = [np.ascontiguousarray(array) for array in inputs]
        try:
            outputs = session.infer(contiguous, mode="static")
        except Exception as error:  # its errors share no base class
            reason = " ".join(str(error).split())
            raise ExecutionError(f"{om_file(graph)} failed to run: {reason}") from error
        return [
            np.asarray(array).reshape(tensor.shape)
            for array, tensor in zip(outputs, graph.outputs, strict=True)
        ]

    def _open(self, file: str) -> _InferSession:
        path = self._folder.path / Path(file).with_suffix(".om")
        if not path.is_file():
            raise FolderError(
                f"{path} is missing; run build_om.sh in that folder on a machine with CANN's "
                "toolkit (an NPU is not needed for it)"
            )
        try:
            return cast(
                _InferSession, self._open_session(device_id=self._device_id, model_path=str(path))
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ExecutionError(f"{path} cannot be loaded: {reason}") from error


def om_file(graph: StaticGraph) -> str:
    """Name of the offline model that atc makes of a graph."""
    return str(Path(graph.file).with_suffix(".om"))


def open_om_backend(folder: ModelFolder, device_id: int = 0) -> StaticBackend:
    """The folder's offline models on an NPU; see `StaticBackend`.

    Raises:
        MissingPackageError: ais_bench, or the CANN runtime below it, is not installed.
    """
    return StaticBackend(OmDevice(folder, device_id), folder.manifest)


def _session_class() -> Any:
    try:
        return importlib.import_module(_MODULE).InferSession
    except ImportError as error:
        raise MissingPackageError(
            f"the provider npu needs ais_bench, which is not usable here ({error}); install "
            "CANN's toolkit and NPU driver (hiascend.com), source its set_env.sh, and install "
            "the wheels aclruntime and ais_bench of the Ascend tools repository"
        ) from error
