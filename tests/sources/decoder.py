"""One ONNX decoder behind the names of its manifest, fed call by call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from trianglemix.custom_ops.library import library_path
from trianglemix.manifest.manifest import LayerCache, Manifest

from tests.sources.oracle import Text

Array = NDArray[Any]


class Decoder:
    """A session; `kernel` registers the native library, otherwise the function body runs."""

    def __init__(self, path: Path, manifest: Manifest, *, kernel: bool) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if kernel:
            options.register_custom_ops_library(str(library_path()))
        self.path, self.manifest = path, manifest
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self._inputs = {value.name: value.type for value in inputs}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def logits(self, text: Text, calls: Sequence[int], prompt_length: int | None = None) -> Array:
        """`[B, N, vocabulary]` of a text whose tokens come in `calls` of these sizes."""
        past = {name: self._empty(layer, name, len(text.ids)) for layer in self.manifest.cache
                for name in (layer.past_key, layer.past_value)}  # fmt: skip
        parts, start = [], 0
        for size in calls:
            outputs = self._call(text, start, start + size, past, prompt_length)
            parts.append(outputs[self.manifest.logits].astype(np.float64))
            for layer in self.manifest.cache:
                past[layer.past_key] = outputs[layer.present_key]
                past[layer.past_value] = outputs[layer.present_value]
            start += size
        assert start == text.ids.shape[1]
        return np.concatenate(parts, axis=1)

    def _call(
        self, text: Text, start: int, end: int, past: dict[str, Array], prompt_length: int | None
    ) -> dict[str, Array]:
        manifest = self.manifest
        feeds: dict[str, Array] = {
            manifest.input_ids: text.ids[:, start:end],
            manifest.attention_mask: text.mask[:, :end],
            **past,
        }
        if manifest.position_ids:
            feeds[manifest.position_ids] = text.positions[:, start:end]
        if prompt_length is not None and manifest.prompt_length in self._inputs:
            assert manifest.prompt_length is not None
            feeds[manifest.prompt_length] = np.full(len(text.ids), prompt_length, np.int32)
        typed = {name: self._typed(name, array) for name, array in feeds.items()}
        return dict(zip(self._outputs, self._session.run(None, typed), strict=True))

    def _empty(self, layer: LayerCache, name: str, batch: int) -> Array:
        size = layer.head_size if name == layer.past_key else layer.value_head_size
        return np.zeros((batch, layer.kv_num_heads, 0, size), np.float32)

    def _typed(self, name: str, array: Array) -> Array:
        kinds = {"int64": np.int64, "int32": np.int32, "float16": np.float16, "bool": np.bool_}
        kind = self._inputs[name].removeprefix("tensor(").removesuffix(")")
        return array.astype(kinds.get(kind, np.float32))
