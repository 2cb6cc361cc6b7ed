"""The target hopper: the operator in dense layers too, and with it rows padded on the left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.lengths import PROMPT_LENGTH
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import AttentionNode, is_attention
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example
from tests.tiny_models import GQA_ROUTE, tiny_model


def _assert_padded_rows_equal_themselves_alone(folder: Path, vocabulary: int) -> None:
    """A prompt padded on the left and two steps after it, against each row alone."""
    session = Session.of(folder)
    ids, pads = random_ids(3, 34, vocabulary), (0, 5, 19)
    mask = np.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    cuts = ((0, 30), (30, 33), (33, 34))
    together = _calls(session, ids, mask, cuts)
    for row, count in enumerate(pads):
        alone = ids[row : row + 1, count:]
        shifted = tuple((max(0, begin - count), end - count) for begin, end in cuts)
        expected = _calls(session, alone, np.ones_like(alone), shifted)
        assert_close(together[row : row + 1, count:], expected)


def _calls(
    session: Session, ids: np.ndarray, mask: np.ndarray, cuts: tuple[tuple[int, int], ...]
) -> np.ndarray:
    past, parts = session.empty_cache(len(ids)), []
    for begin, end in cuts:
        outputs = session.run(ids[:, begin:end], mask[:, :end], past)
        parts.append(outputs[session.manifest.logits])
        past = session.carried(outputs)
    return np.concatenate(parts, axis=1)


def test_dense_layers_are_the_operators_dense_mode(tmp_path: Path) -> None:
    path = save_example(PATTERN.example().model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(2,), target="hopper")
    nodes = list(ir.load(tmp_path / "out" / "model.onnx").graph)
    windows = [node.attributes[contract.ATTR_WINDOW].value for node in nodes if is_attention(node)]
    assert windows == [-1, -1, 6]
    assert not [node for node in nodes if node.op_type == "GroupQueryAttention"]
    names = ["TriangleAttention (dense mode)"] * 2 + ["TriangleAttention"]
    assert [row.runs_as for row in report.layers] == names
    assert report.target == Manifest.load(tmp_path / "out").target == "hopper"


@pytest.mark.parametrize("route", ["dynamo-sdpa-20", "torchscript-18"])
def test_left_padded_rows_equal_each_row_alone(route: str, tmp_path: Path) -> None:
    model = tiny_model("llama", route)
    report = export_to(model.path, tmp_path / "out", layers=(1, 2), target="hopper", verify=True)
    assert Manifest.load(tmp_path / "out").left_padding
    assert report.verification[0].name == "short prompt, one row padded"
    _assert_padded_rows_equal_themselves_alone(tmp_path / "out", model.vocab_size)


@pytest.mark.parametrize("target", ["cpu", "hopper"])
@pytest.mark.parametrize("counts_pads", [True, False])
def test_left_padding_and_a_rotation_inside_go_together(
    counts_pads: bool, target: str, tmp_path: Path
) -> None:
    """Slots differ from positions by a row's pads, which no score sees: only differences count."""
    source = _rotating_source(tmp_path, counts_pads)
    export_to(source, tmp_path / "out", layers=(1, 2), target=target)
    nodes = [n for n in ir.load(tmp_path / "out" / "model.onnx").graph if is_attention(n)]
    assert [AttentionNode(node).is_folded for node in nodes] == [target == "hopper"] * 3
    assert Manifest.load(tmp_path / "out").left_padding
    _assert_padded_rows_equal_themselves_alone(tmp_path / "out", 256)


def _rotating_source(place: Path, counts_pads: bool) -> Path:
    """A model written by hand: its nodes rotate inside, and read their lengths off the mask.

    Its `seqlens_k` counts all columns of the mask, or the real tokens alone as genai's does.
    """
    folded = place / "folded"
    export_to(tiny_model("llama", GQA_ROUTE).path, folded, layers=(1, 2), target="hopper")
    model = ir.external_data.load_to_model(ir.load(folded / "model.onnx"))
    graph = model.graph
    nodes = [node for node in graph if is_attention(node)]
    build = GraphBuilder(graph, "by_hand")
    seqlens = nodes[0].inputs[5]
    assert seqlens is not None
    if counts_pads:
        (mask,) = (value for value in graph.inputs if value.name == "attention_mask")
        total = build.cast(build.dimension(mask, 1), ir.DataType.INT32)
        none = build.op("Sub", seqlens, seqlens)
        seqlens = build.op("Add", none, build.op("Sub", total, build.int32(1)))
    end = build.op("Add", seqlens, build.int32(1))
    graph.insert_before(nodes[0], build.nodes)
    for node in nodes:
        node.replace_input_with(5, seqlens)
        node.replace_input_with(7, end)
    common.RemoveUnusedNodesPass()(model)
    (told,) = (value for value in graph.inputs if value.name == PROMPT_LENGTH)
    graph.inputs.remove(told)
    graph.initializers.pop(PROMPT_LENGTH)
    positions = ir.Shape(["batch", "length"])
    kind = ir.TensorType(ir.DataType.INT64)
    graph.inputs.append(ir.Value(name="position_ids", type=kind, shape=positions))
    return save_example(model, place / "by_hand")


def test_exported_again_for_the_cpu_it_is_the_cpus_export(tmp_path: Path) -> None:
    source = tiny_model("llama", "torchscript-18").path
    export_to(source, tmp_path / "hopper", layers=(1,), target="hopper")
    export_to(tmp_path / "hopper", tmp_path / "again", layers=(1,))
    export_to(source, tmp_path / "cpu", layers=(1,))
    assert Manifest.load(tmp_path / "again") == Manifest.load(tmp_path / "cpu")
    ids = random_ids(2, 33, 256)
    again, direct = (Session.of(tmp_path / name).logits(ids) for name in ("again", "cpu"))
    assert_close(again, direct)


@pytest.mark.parametrize(
    ("target", "first"), [("cpu", "CPU"), ("cuda", "CUDA"), ("hopper", "CUDA")]
)
def test_verification_runs_on_the_targets_provider(
    target: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_example(PATTERN.example().model, tmp_path / "source")
    asked: list[list[str]] = []

    def session(path: str, options: Any, providers: list[str], **_: object) -> None:
        asked.append(providers)
        raise RuntimeError("seen")

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    fake = SimpleNamespace(
        SessionOptions=SimpleNamespace,
        get_available_providers=lambda: names,
        InferenceSession=session,
    )
    monkeypatch.setattr("trianglemix.exporter.verify.session.import_onnxruntime", lambda: fake)
    nowhere = "trianglemix.exporter.verify.verify_export.find_library"
    monkeypatch.setattr(nowhere, lambda: (None, []))
    with pytest.raises(ExportError, match="does not open: seen"):
        export_to(path, tmp_path / "out", layers=(1,), target=target, verify=True)
    assert asked == [names if first == "CUDA" else names[1:]]
