"""One preallocated buffer bound to past and present gives what a growing cache gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.options import PatternRequest
from trianglemix.exporter.patterns._example import ExampleLayer, decomposed_attention
from trianglemix.manifest.manifest import Manifest

from tests.exporter import odd_models
from tests.exporter.exports import (
    Array,
    Session,
    assert_close,
    export_to,
    random_ids,
    save_example,
)
from tests.tiny_models import tiny_model

CAPACITY = 64


def _run_bound(session: Session, ids: Array, calls: tuple[int, ...]) -> Array:
    """Logits of all calls, past and present bound to the same buffers full of NaN."""
    manifest = session.manifest
    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(np.full_like(array, np.nan))
        for name, array in session.empty_cache(len(ids), CAPACITY).items()
    }
    parts, end = [], 0
    for size in calls:
        start, end = end, end + size
        binding = session.session.io_binding()
        feeds = {
            manifest.input_ids: ids[:, start:end],
            manifest.attention_mask: np.ones((len(ids), end), np.int64),
            manifest.position_ids: np.tile(np.arange(start, end), (len(ids), 1)),
        }
        for name, array in feeds.items():
            if name in session.inputs:
                value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                binding.bind_ortvalue_input(name, value)
        for layer in manifest.cache:
            for past, present in (
                (layer.past_key, layer.present_key),
                (layer.past_value, layer.present_value),
            ):
                binding.bind_ortvalue_input(past, buffers[past])
                binding.bind_ortvalue_output(present, buffers[past])
        binding.bind_output(manifest.logits)
        session.session.run_with_iobinding(binding)
        parts.append(binding.get_outputs()[-1].numpy())
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("route", ["dynamo-sdpa-20", "torchscript-18", "gqa"])
def test_bound_buffers_equal_a_growing_cache(route: str, tmp_path: Path) -> None:
    model = tiny_model("llama", route)
    export_to(model.path, tmp_path / "out", layers=(1, 2))
    session = Session.of(tmp_path / "out")
    assert session.manifest.shared_cache
    ids = random_ids(2, 33, model.vocab_size)
    past, parts = session.empty_cache(2), []
    for start, end in ((0, 20), (20, 32), (32, 33)):
        outputs = session.run(ids[:, start:end], np.ones((2, end), np.int64), past)
        parts.append(outputs["logits"])
        past = session.carried(outputs)
    assert_close(_run_bound(session, ids, (20, 12, 1)), np.concatenate(parts, axis=1))


def test_a_graph_that_reads_the_past_otherwise_cannot_share(tmp_path: Path) -> None:
    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        output, key, value = decomposed_attention(build, layer)
        seen = build.op("ReduceMax", layer.past_key, keepdims=0)
        nothing = build.op("Mul", seen, build.constant("nought", np.array(0, np.float32)))
        return build.op("Add", output, nothing), key, value

    path = save_example(odd_models.in_place_of(attend).model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(1,))
    assert not Manifest.load(tmp_path / "out").shared_cache
    assert any("cannot share" in note for note in report.notes)


def test_the_cache_length_is_read_from_the_mask(tmp_path: Path) -> None:
    """A graph that counts positions by its past's length still counts right in a long buffer."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        output, key, value = decomposed_attention(build, layer)
        whole = build.op("Shape", layer.past_key)
        past = build.cast(build.op("Gather", whole, build.ints(2)), ir.DataType.FLOAT)
        return build.op("Add", output, past), key, value

    path = save_example(odd_models.in_place_of(attend).model, tmp_path / "source")
    keep_all = PatternRequest(4, 64, 8)
    report = export_to(path, tmp_path / "out", layers=(1,), pattern=keep_all)
    assert report.shared_cache
    session = Session.of(tmp_path / "out")
    source = Session(path, session.manifest)
    ids = random_ids(1, 20)
    first = source.run(ids[:, :15])
    second = source.run(ids[:, 15:], np.ones((1, 20), np.int64), source.carried(first))
    expected = np.concatenate([first["logits"], second["logits"]], axis=1)
    assert_close(_run_bound(session, ids, (15, 5)), expected)
