"""One cache of all layers, `[layers, 2, batch, heads, tokens, size]`, taken apart in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.options import PatternRequest
from trianglemix.exporter.patterns._example import SHAPE, build_example, decomposed_attention
from trianglemix.runtime import TriangleSession

from tests.exporter.exports import Array, assert_close, export_to, random_ids, save_example

_LAYERS = 3


def _stacked() -> ir.Model:
    model = build_example(decomposed_attention, opset=18).model
    graph = model.graph
    sizes = [_LAYERS, 2, "batch", SHAPE.kv_num_heads, "past", SHAPE.head_size]
    cache = ir.Value(name="past", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes))
    build = GraphBuilder(graph, "stack")
    for number, value in enumerate(list(graph.inputs[2:])):
        layer = build.op("Gather", cache, build.int64(number // 2), axis=0)
        value.replace_all_uses_with(build.op("Gather", layer, build.int64(number % 2), axis=0))
    graph.inputs[2:] = [cache]
    after = GraphBuilder(graph, "unstack")
    rows = [after.op("Unsqueeze", x, after.ints(0, 1)) for x in graph.outputs[1:]]
    pairs = [after.op("Concat", *rows[n : n + 2], axis=1) for n in range(0, len(rows), 2)]
    present = after.op("Concat", *pairs, axis=0)
    present.name, present.type = "present", cache.type
    present.shape = ir.Shape([*sizes[:4], "total", sizes[5]])
    graph.insert_before(next(iter(graph)), build.nodes)
    graph.extend(after.nodes)
    graph.outputs[1:] = [present]
    return model


def _two_calls(path: Path, ids: Array, empty_batch: int) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    sizes = (_LAYERS, 2, empty_batch, SHAPE.kv_num_heads, 0, SHAPE.head_size)
    past, results = np.zeros(sizes, np.float32), []
    for part, total in ((ids[:, :-3], ids.shape[1] - 3), (ids[:, -3:], ids.shape[1])):
        mask = np.ones((len(ids), total), np.int64)
        feeds = {"input_ids": part, "attention_mask": mask, "past": past}
        logits, past = session.run(["logits", "present"], feeds)
        results += [logits, past]
    return results


def test_a_stacked_cache(tmp_path: Path) -> None:
    path = save_example(_stacked(), tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(0, 2), pattern=PatternRequest(4, 64, 8), verify=True)
    ids = random_ids(2, 20)
    for empty_batch in (2, 0):  # ONNX Runtime's Concat takes what is empty of any batch
        ours = _two_calls(tmp_path / "out" / "model.onnx", ids, empty_batch)
        for mine, wanted in zip(ours, _two_calls(path, ids, empty_batch), strict=True):
            assert_close(mine, wanted)


def test_the_runtime_carries_a_stacked_cache(tmp_path: Path) -> None:
    path = save_example(_stacked(), tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(1,), pattern=PatternRequest(4, 64, 8))
    ids = random_ids(1, 12)
    made = TriangleSession.from_folder(tmp_path / "out").generate(ids[0].tolist(), max_new_tokens=3)
    for token in made.ids:
        text = np.concatenate([ids, ids[:, :3]], axis=1)  # the first call's logits alone count
        assert _two_calls(path, text, 1)[0][0, -1].argmax() == token
        ids = np.concatenate([ids, [[token]]], axis=1)
