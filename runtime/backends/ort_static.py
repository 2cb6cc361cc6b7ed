"""Runs a folder's static graphs on ONNX Runtime's CPU provider: the very files that atc takes.

Graphs that keep the custom operator run on this package's CPU kernel of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import onnxruntime as ort
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.library import library_path
from trianglemix.manifest.static_graphs import StaticGraph
from trianglemix.runtime.backends.host_store import HostStore
from trianglemix.runtime.backends.ort_errors import ORT_ERRORS, execution_error
from trianglemix.runtime.backends.static_cache import StaticBackend, StaticStore
from trianglemix.runtime.model_folder import ModelFolder

_ERRORS_ONLY: Final = 3


class OrtStaticDevice:
    """Sessions of the graphs, each opened when it is first needed."""

    provider = "cpu"

    def __init__(self, folder: ModelFolder, threads: int | None) -> None:
        self._folder, self._threads = folder, threads
        self._session = cache(self._open)

    def open_store(self) -> StaticStore:
        """See `StaticDevice.open_store`."""
        return HostStore(self._folder.manifest, self._execute)

    def _execute(self, graph: StaticGraph, inputs: list[Array]) -> Sequence[Array]:
        feeds = {tensor.name: array for tensor, array in zip(graph.inputs, inputs, strict=True)}
        names = [tensor.name for tensor in graph.outputs]
        try:
            outputs: Sequence[Array] = self._session(graph.file).run(names, feeds)
        except ORT_ERRORS as error:
            raise execution_error(f"{graph.file} failed to run", error) from error
        return outputs

    def _open(self, file: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = self._folder.path / file
        static = self._folder.manifest.static
        try:
            if static is not None and static.lowering == "custom":
                options.log_severity_level = _ERRORS_ONLY
                options.register_custom_ops_library(str(library_path()))
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise execution_error(f"{path} cannot be loaded", error) from error


def open_static_backend(folder: ModelFolder, threads: int | None) -> StaticBackend:
    """The folder's graphs on the CPU; see `StaticBackend`.

    Raises:
        LibraryNotFoundError: the graphs hold the custom operator, whose kernel is not installed.
    """
    if folder.manifest.static is not None and folder.manifest.static.lowering == "custom":
        library_path()
    return StaticBackend(OrtStaticDevice(folder, threads), folder.manifest)
