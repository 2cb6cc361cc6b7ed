"""Layers that attend an earlier layer's keys and values: one cache, read by several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.patterns._example import (
    SHAPE,
    ExampleLayer,
    additive_mask,
    build_example,
    decomposed_attention,
    merged,
)
from trianglemix.exporter.pipeline import export
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime import TriangleSession

from tests.exporter import odd_models
from tests.exporter.exports import (
    Session,
    Silent,
    assert_close,
    export_to,
    random_ids,
    save_example,
)
from tests.exporter.targets.ascend.test_verify_static import verified

_KEEP_ALL = PatternRequest(4, 64, 8)
_SHARING = 2  # the layer that reads layer 0's keys and values

Attend = Callable[[GraphBuilder, ExampleLayer], odd_models.Result]


def _sharing(attend: Attend, opset: int) -> Example:
    """Layers 0 and 1 append to a cache; layer 2 attends what layer 0 has appended."""
    seen: list[odd_models.Result] = []

    def layer(build: GraphBuilder, given: ExampleLayer) -> odd_models.Result:
        if len(seen) < _SHARING:
            seen.append(attend(build, given))
            return seen[-1]
        first = len(build.nodes)
        output, key, value = attend(build, given)
        for own, other in zip((key, value), seen[0][1:], strict=True):
            for node in build.nodes[first:]:
                for index, used in enumerate(node.inputs):
                    if used is own:
                        node.replace_input_with(index, other)
        return output, build.op("Identity", key), build.op("Identity", value)

    model = build_example(layer, opset=opset).model
    graph = model.graph
    del graph.outputs[-2:]
    for value in [x for x in graph.inputs if f".{_SHARING}." in str(x.name)]:
        for node, index in list(value.uses()):
            node.replace_input_with(index, None)
        graph.inputs.remove(value)
    dead = [node for node in graph if None in node.inputs and node.op_type == "Concat"]
    graph.remove([x for node in dead for x in node.outputs[0].consumers()], safe=True)
    graph.remove(dead, safe=True)
    return Example(model, SHAPE, 3, 61)


def _node_attention(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
    """Attention of opset 23, the append before the node."""
    rows = build.op("Reshape", layer.query, build.ints(0, 0, SHAPE.num_heads, SHAPE.head_size))
    query = build.op("Transpose", rows, perm=[0, 2, 1, 3])
    _, key, value = decomposed_attention(build, layer)
    result = build.op("Attention", query, key, value, additive_mask(build, layer))
    return merged(build, result), key, value


@pytest.mark.parametrize(("attend", "opset"), [(decomposed_attention, 18), (_node_attention, 23)])
def test_shared_keys_are_read_from_the_layer_that_has_them(
    attend: Attend, opset: int, tmp_path: Path
) -> None:
    path = save_example(_sharing(attend, opset).model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(1, 2), pattern=_KEEP_ALL)
    ours = Session.of(tmp_path / "out")
    assert [layer.layer for layer in ours.manifest.cache] == [0, 1]
    assert ours.manifest.num_layers == 3
    theirs = Session(path, ours.manifest)
    ids = random_ids(2, 24)
    mask = ids * 0 + 1
    first, wanted = (model.run(ids[:, :-3], mask[:, :-3]) for model in (ours, theirs))
    assert_close(first["logits"], wanted["logits"])
    then, wanted = (
        model.run(ids[:, -3:], mask, model.carried(before))
        for model, before in ((ours, first), (theirs, wanted))
    )
    assert_close(then["logits"], wanted["logits"])
    assert_close(then["present.0.key"], wanted["present.0.key"])


def test_the_runtime_keeps_one_cache_for_them(tmp_path: Path) -> None:
    path = save_example(_sharing(decomposed_attention, 18).model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(1,), pattern=_KEEP_ALL)
    ids = random_ids(1, 20)
    chunked = TriangleSession.from_folder(tmp_path / "out").generate(
        ids[0].tolist(), max_new_tokens=3, prefill_chunk=7
    )
    logits = Session(path, Manifest.load(tmp_path / "out"))
    for token in chunked.ids:
        assert logits.logits(ids)[0, -1].argmax() == token
        ids = np.concatenate([ids, [[token]]], axis=1)


def test_static_graphs_hold_one_cache_for_them(tmp_path: Path) -> None:
    path = save_example(_sharing(decomposed_attention, 18).model, tmp_path / "source")
    report = verified(path, tmp_path / "out")
    assert report.verification
    assert [layer.layer for layer in Manifest.load(tmp_path / "out").cache] == [0, 1]


def test_keys_that_a_node_appended_inside_are_refused_by_name(tmp_path: Path) -> None:
    """Standard Attention with its cache inside: what it hands out is no other layer's input."""

    def attend(build: GraphBuilder, layer: ExampleLayer) -> odd_models.Result:
        node = build.node(
            "Attention",
            [layer.query, layer.key, layer.value, additive_mask(build, layer), layer.past_key,
             layer.past_value],
            attributes={"q_num_heads": SHAPE.num_heads, "kv_num_heads": SHAPE.kv_num_heads},
            num_outputs=3,
        )  # fmt: skip
        rows = build.op("Reshape", node.outputs[0], build.ints(0, 0, SHAPE.num_heads, -1))
        query = build.op("Transpose", rows, perm=[0, 2, 1, 3])
        again = build.op("Attention", query, *node.outputs[1:], additive_mask(build, layer))
        return merged(build, again), node.outputs[1], node.outputs[2]

    path = save_example(build_example(attend, opset=23).model, tmp_path / "source")
    with pytest.raises(RefusedError, match=r"present of .*Attention, an earlier layer"):
        export_to(path, tmp_path / "out", layers=(1,))


def test_the_operator_reads_the_shared_past(tmp_path: Path) -> None:
    """No layer's keys are appended twice: both nodes have one past, and one present is read."""
    path = save_example(_sharing(decomposed_attention, 18).model, tmp_path / "source")
    observer = Silent()
    export(ExportOptions(path, tmp_path / "out", layers=LayerRequest(layers=(1,))), observer)
    assert observer.seen is not None
    first, _, last = observer.seen.found
    assert last.past == first.past
    assert last.present is None
    nodes = [x for x in ir.load(tmp_path / "out" / "model.onnx").graph
             if x.op_type == "TriangleAttention"]  # fmt: skip
    assert nodes[2].inputs[3] is nodes[0].inputs[3]
    assert not any(value.uses() for value in nodes[2].outputs[1:])
