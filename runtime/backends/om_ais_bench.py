"""Runs offline models (.om) on an Ascend NPU through ais_bench's InferSession."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.manifest.static_graphs import StaticGraph
from trianglemix.runtime.backends.host_store import HostStore
from trianglemix.runtime.backends.om_file import find_om, om_file
from trianglemix.runtime.backends.static_cache import StaticStore
from trianglemix.runtime.errors import ExecutionError
from trianglemix.runtime.model_folder import ModelFolder

MODULE: Final = "ais_bench.infer.interface"


class _InferSession(Protocol):
    """What is used of ais_bench's class."""

    def infer(self, feeds: list[Array], mode: str) -> list[Array]: ...


class AisBenchDevice:
    """Offline models, each loaded when it is first needed.

    The cache lies in host memory, because that is what InferSession takes and gives: every call
    carries it to the device. Correct, not fast; see docs/ascend.md.
    """

    provider = "npu"

    def __init__(self, module: Any, folder: ModelFolder, device_id: int) -> None:
        self._folder, self._device_id = folder, device_id
        self._open_session = module.InferSession
        self._sessions: dict[str, _InferSession] = {}

    def open_store(self) -> StaticStore:
        """See `StaticDevice.open_store`."""
        return HostStore(self._folder.manifest, self._execute)

    def _execute(self, graph: StaticGraph, inputs: list[Array]) -> Sequence[Array]:
        session = self._session(graph)
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

    def _session(self, graph: StaticGraph) -> _InferSession:
        if graph.file not in self._sessions:
            path = find_om(self._folder, graph)
            try:
                session = self._open_session(device_id=self._device_id, model_path=str(path))
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ExecutionError(f"{path} cannot be loaded: {reason}") from error
            self._sessions[graph.file] = cast(_InferSession, session)
        return self._sessions[graph.file]
