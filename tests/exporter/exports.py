"""Exports made for the tests, and sessions over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.attention.sites import Sites
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.manifest.manifest import Manifest

Array = NDArray[Any]
SMALL = PatternRequest(sink=2, window=6, last=3)  # drops keys from the 12th token on


@dataclass
class Silent:
    """An observer that only remembers what it was told."""

    stages: list[str] = field(default_factory=list)
    seen: Sites | None = None

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def sites(self, sites: Sites) -> None:
        self.seen = sites


def save_example(model: ir.Model, folder: Path) -> Path:
    """`folder/model.onnx`."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def export_to(
    source: Path,
    output: Path,
    layers: tuple[int, ...] | LayerRequest | None = None,
    **options: Any,
) -> ExportReport:
    """Exports with the small pattern unless told otherwise; `layers` None: by plan or default."""
    settings: dict[str, Any] = {
        "layers": layers if isinstance(layers, LayerRequest) else LayerRequest(layers=layers),
        "pattern": SMALL,
        **options,
    }
    return export(ExportOptions(source=source, output=output, **settings), Silent())


def rename_all(model: ir.Model) -> None:
    """Every node and inner value gets another name, as any optimizer may give it."""
    interface = {*model.graph.inputs, *model.graph.outputs}
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        for value in node.outputs:
            if value not in interface:
                value.name = f"v{number}_{value.index()}"


class Session:
    """A model behind the names of a manifest; `kernel` registers the native library."""

    def __init__(self, path: Path, manifest: Manifest, *, kernel: bool = True) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if kernel:
            options.register_custom_ops_library(str(library_path()))
        self.manifest = manifest
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = [*self.session.get_inputs(), *self.session.get_overridable_initializers()]
        self.inputs = {value.name for value in inputs}

    @classmethod
    def of(cls, folder: Path, *, kernel: bool = True) -> Session:
        manifest = Manifest.load(folder)
        return cls(folder / manifest.model_file, manifest, kernel=kernel)

    def run(
        self,
        ids: Array,
        mask: Array | None = None,
        past: dict[str, Array] | None = None,
        prompt_length: list[int] | None = None,
    ) -> dict[str, Array]:
        """All outputs by name. The mask is `[B, T]`, all ones if absent."""
        manifest = self.manifest
        mask = np.ones_like(ids) if mask is None else mask
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds: dict[str, Array] = {manifest.input_ids: ids, manifest.attention_mask: mask}
        feeds |= self.empty_cache(len(ids)) if past is None else past
        if manifest.position_ids:
            feeds[manifest.position_ids] = positions
        if prompt_length is not None:
            assert manifest.prompt_length is not None
            feeds[manifest.prompt_length] = np.array(prompt_length, np.int32)
        names = [value.name for value in self.session.get_outputs()]
        used = {name: array for name, array in feeds.items() if name in self.inputs}
        return dict(zip(names, self.session.run(names, used), strict=True))

    def logits(self, ids: Array, mask: Array | None = None, **rest: Any) -> Array:
        result: Array = self.run(ids, mask, **rest)[self.manifest.logits]
        return result

    def empty_cache(self, batch: int, length: int = 0) -> dict[str, Array]:
        dtype = np.dtype(self.manifest.cache_dtype)
        cache = {}
        for layer in self.manifest.cache:
            for name, size in (
                (layer.past_key, layer.head_size),
                (layer.past_value, layer.value_head_size),
            ):
                cache[name] = np.zeros((batch, layer.kv_num_heads, length, size), dtype)
        return cache

    def carried(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """Presents of one call as the pasts of the next."""
        pairs = [(c.past_key, c.present_key) for c in self.manifest.cache]
        pairs += [(c.past_value, c.present_value) for c in self.manifest.cache]
        return {past: outputs[present] for past, present in pairs}


def random_ids(batch: int, length: int, vocabulary: int = 61, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, vocabulary, (batch, length))


def assert_close(actual: Array, expected: Array, tolerance: float = 2e-5) -> None:
    """Prints the first bad index and both values; relative to the largest expected number."""
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    allowed = tolerance * max(1.0, float(np.abs(expected).max(initial=0)))
    bad = ~(np.abs(actual - expected) <= allowed)  # NaN is bad
    if bad.any():
        index = tuple(int(x) for x in np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} off by more than {allowed:.1e}, first at {index}: "
            f"{actual[index]} != {expected[index]}"
        )
