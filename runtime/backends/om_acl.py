"""Runs offline models (.om) on an Ascend NPU through pyACL; the cache stays on the device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.manifest.static_graphs import StaticGraph, StaticTensor
from trianglemix.runtime.backends.acl_runtime import AclModel, AclRuntime
from trianglemix.runtime.backends.backend import Logits, as_float32
from trianglemix.runtime.backends.om_file import find_om, om_file
from trianglemix.runtime.backends.static_cache import StaticStore
from trianglemix.runtime.errors import ExecutionError
from trianglemix.runtime.model_folder import ModelFolder

_SPARE_BYTES: Final = 64
"""An offline model may ask for a little more than a tensor, to have it end on a border of 32."""


@dataclass(frozen=True)
class _LoadedGraph:
    """An offline model with device memory for its outputs and for its inputs but the cache."""

    model: AclModel
    small: dict[str, int]
    outputs: dict[str, int]
    output_dataset: Any


class AclDevice:
    """Offline models, each loaded when it is first needed and kept until the device is let go."""

    provider = "npu"

    def __init__(self, acl: Any, folder: ModelFolder, device_id: int) -> None:
        self.folder = folder
        self.runtime = AclRuntime(acl, device_id)
        self._loaded: dict[str, _LoadedGraph] = {}
        weakref.finalize(self, self.runtime.close)

    def open_store(self) -> StaticStore:
        """See `StaticDevice.open_store`."""
        return _AclStore(self)

    def loaded(self, graph: StaticGraph, cached: frozenset[str]) -> _LoadedGraph:
        """The graph's offline model; inputs named in `cached` get no memory here.

        Raises:
            FolderError: atc has not made it.
            ExecutionError: it cannot be loaded, or is of another export.
        """
        if graph.file not in self._loaded:
            model = self.runtime.load(find_om(self.folder, graph))
            _check_sizes(graph, model)
            outputs = [self.runtime.allocate(size) for size in model.output_bytes]
            self._loaded[graph.file] = _LoadedGraph(
                model,
                {
                    tensor.name: self.runtime.allocate(size)
                    for tensor, size in zip(graph.inputs, model.input_bytes, strict=True)
                    if tensor.name not in cached
                },
                {t.name: a for t, a in zip(graph.outputs, outputs, strict=True)},
                self.runtime.make_dataset(list(zip(outputs, model.output_bytes, strict=True))),
            )
        return self._loaded[graph.file]


class _AclStore:
    """The cache of one sequence in device memory; new rows are copied to their slots there."""

    def __init__(self, device: AclDevice) -> None:
        manifest = device.folder.manifest
        static = manifest.static
        assert static is not None
        self._device, self._logits = device, manifest.logits
        self._tensors = {tensor.name: tensor for graph in static.graphs for tensor in graph.inputs}
        self._past_of = manifest.past_of
        self._cached = frozenset(self._past_of.values())
        self._addresses: list[int] = []
        self._datasets: list[Any] = []
        weakref.finalize(self, device.runtime.release, self._addresses, self._datasets)
        device.runtime.bind_thread()
        self._cache: dict[str, int] = {}
        for name in sorted(self._cached & set(self._tensors)):
            room = self._tensors[name].nbytes + _SPARE_BYTES
            self._cache[name] = device.runtime.allocate(room)
            self._addresses.append(self._cache[name])
        self._inputs: dict[str, Any] = {}

    def run(
        self, graph: StaticGraph, small: dict[str, Array], start: int, rows: int
    ) -> Logits | None:
        """See `StaticStore.run`."""
        runtime = self._device.runtime
        runtime.bind_thread()
        loaded = self._device.loaded(graph, self._cached)
        inputs = self._input_dataset(graph, loaded)
        for name, array in small.items():
            runtime.upload(loaded.small[name], np.ascontiguousarray(array))
        try:
            runtime.execute(loaded.model, inputs, loaded.output_dataset)
        except ExecutionError as error:
            raise ExecutionError(f"{om_file(graph)} failed to run: {error}") from error
        runtime.move(list(self._new_rows(graph, loaded, start, rows)))
        for tensor in graph.outputs:
            if tensor.name == self._logits:
                return self._read_logits(tensor, loaded.outputs[tensor.name])
        return None

    def _input_dataset(self, graph: StaticGraph, loaded: _LoadedGraph) -> Any:
        """This cache as the graph's inputs, beside the graph's own small ones."""
        if graph.file not in self._inputs:
            dataset = self._device.runtime.make_dataset(
                [
                    (self._cache.get(tensor.name) or loaded.small[tensor.name], size)
                    for tensor, size in zip(graph.inputs, loaded.model.input_bytes, strict=True)
                ]
            )
            self._datasets.append(dataset)
            self._inputs[graph.file] = dataset
        return self._inputs[graph.file]

    def _new_rows(
        self, graph: StaticGraph, loaded: _LoadedGraph, start: int, rows: int
    ) -> Iterator[tuple[int, int, int]]:
        """`(to, from, bytes)` of each head: `new [1, G, S, D]` rows into `cache [1, G, M, D]`."""
        for tensor in graph.outputs:
            if tensor.name == self._logits:
                continue
            past = self._past_of[tensor.name]
            _, heads, new_rows, size = tensor.shape
            slots, row = self._tensors[past].shape[2], size * tensor.itemsize
            for head in range(heads):
                target = self._cache[past] + (head * slots + start) * row
                source = loaded.outputs[tensor.name] + head * new_rows * row
                yield target, source, rows * row

    def _read_logits(self, tensor: StaticTensor, address: int) -> Logits:
        """`[1, vocabulary]` of the last row."""
        raw = np.empty(tensor.shape, "uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        self._device.runtime.download(raw, address)
        return as_float32(raw[:, -1], tensor.dtype)


def _check_sizes(graph: StaticGraph, model: AclModel) -> None:
    """An offline model of another export has other inputs."""
    for side, tensors, found in (
        ("inputs", graph.inputs, model.input_bytes),
        ("outputs", graph.outputs, model.output_bytes),
    ):
        wanted = [tensor.nbytes for tensor in tensors]
        more = [got - size for got, size in zip(found, wanted, strict=False)]
        if len(found) != len(wanted) or not all(0 <= extra <= _SPARE_BYTES for extra in more):
            raise ExecutionError(
                f"{om_file(graph)} has {side} of {list(found)} bytes, but the manifest says "
                f"{wanted}; it is of another export: run build_om.sh again"
            )
