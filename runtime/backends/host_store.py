"""A cache of static graphs in host memory, for runtimes that take and give NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.manifest.manifest import Manifest
from trianglemix.manifest.static_graphs import StaticGraph
from trianglemix.runtime.backends.backend import Logits
from trianglemix.runtime.errors import ExecutionError

Execute = Callable[[StaticGraph, list[Array]], Sequence[Array]]
"""Runs a graph: its inputs in the manifest's order, its outputs likewise."""


class HostStore:
    """Arrays `[1, G, M, D]` of zeros; new rows are copied to their slots after each call."""

    def __init__(self, manifest: Manifest, execute: Execute) -> None:
        assert manifest.static is not None
        if manifest.cache_dtype == "bfloat16":
            raise ExecutionError(
                "a bfloat16 cache has no NumPy type, so this runtime cannot hold it; export the "
                "model in float16, or run it on an NPU through pyACL"
            )
        self._logits = manifest.logits
        self._execute = execute
        self._past_of = manifest.past_of
        held = set(self._past_of.values())
        self._cache = {
            tensor.name: np.zeros(tensor.shape, tensor.dtype)
            for graph in manifest.static.graphs
            for tensor in graph.inputs
            if tensor.name in held
        }

    def run(
        self, graph: StaticGraph, small: dict[str, Array], start: int, rows: int
    ) -> Logits | None:
        """See `StaticStore.run`."""
        inputs = [
            small[tensor.name] if tensor.name in small else self._cache[tensor.name]
            for tensor in graph.inputs
        ]
        outputs = self._execute(graph, inputs)
        logits: Logits | None = None
        for tensor, array in zip(graph.outputs, outputs, strict=True):
            if tensor.name == self._logits:
                logits = np.asarray(array)[:, -1].astype(np.float32)
            else:
                past = self._cache[self._past_of[tensor.name]]
                past[:, :, start : start + rows] = array[:, :, :rows]
        return logits
