"""Unpacking and rotation go back into the nodes for GPUs, and out again, without a difference."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import (
    Array,
    Session,
    assert_close,
    export_to,
    random_ids,
)
from tests.tiny_models import GQA_ROUTE, tiny_model

_TAKEN_OUT = ("RotaryEmbedding", "Split")


def _operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(folder / "model.onnx").graph)


def _logits(folder: Path, ids: Array) -> Array:
    """A prefill's logits, and those of a later chunk after it."""
    session = Session.of(folder)
    length = ids.shape[1]
    first = session.run(ids[:, :-5], prompt_length=[length])
    rest = session.run(
        ids[:, -5:], np.ones((1, length), int), session.carried(first), prompt_length=[length]
    )
    return np.concatenate([first["logits"], rest["logits"]], axis=1)


@pytest.mark.parametrize(("target", "dense_layers"), [("cuda", 1), ("hopper", 0)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_nodes_rotate_inside_as_their_source_did(
    family: str, target: str, dense_layers: int, tmp_path: Path
) -> None:
    source = tiny_model(family, GQA_ROUTE).path
    export_to(source, tmp_path / "apart", layers=(1, 2))
    export_to(source, tmp_path / "inside", layers=(1, 2), target=target)
    inside, before = _operators(tmp_path / "inside"), _operators(source.parent)
    assert inside["TriangleAttention"] == 3 - dense_layers
    assert inside["GroupQueryAttention"] == dense_layers
    assert not Manifest.load(tmp_path / "inside").left_padding, "its source takes none"
    assert [inside[name] for name in _TAKEN_OUT] == [before[name] for name in _TAKEN_OUT]
    assert _operators(tmp_path / "apart")["RotaryEmbedding"] == 6
    ids = random_ids(1, 40)
    assert_close(_logits(tmp_path / "inside", ids), _logits(tmp_path / "apart", ids))


def test_the_rest_of_the_graph_is_the_sources(tmp_path: Path) -> None:
    """Dense layers get back the inputs that their own GroupQueryAttention had."""
    source = tiny_model("llama", GQA_ROUTE).path
    export_to(source, tmp_path / "out", layers=(2,), target="cuda")
    old, new = (
        [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
        for path in (source, tmp_path / "out" / "model.onnx")
    )
    assert len(new) == 2
    for before, after in zip(old, new, strict=False):
        rows = [None if value is None else value.name for value in before.inputs[:5]]
        assert [None if value is None else value.name for value in after.inputs[:5]] == rows
        assert after.attributes["do_rotary"].value == 1
        tables = [value.name for value in before.inputs[7:9] if value is not None]
        assert [value.name for value in after.inputs[7:9] if value is not None] == tables


@pytest.mark.parametrize("target", ["cuda", "hopper"])
def test_verification_compares_with_the_function_body(target: str, tmp_path: Path) -> None:
    source = tiny_model("llama", GQA_ROUTE).path
    report = export_to(source, tmp_path / "out", layers=(1, 2), target=target, verify=True)
    names = [check.name for check in report.verification]
    assert "long prompt, kernel against function body" in names
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == ["model.onnx"]


def test_verification_without_the_library_runs_on_the_function_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_library = "trianglemix.exporter.verify.verify_export.find_library"
    monkeypatch.setattr(find_library, lambda: (None, ["no library"]))
    source = tiny_model("llama", GQA_ROUTE).path
    report = export_to(source, tmp_path / "out", layers=(1, 2), target="cuda", verify=True)
    assert [check.name for check in report.verification] == [
        "short prompt",
        "decode steps after the short prompt",
        "long prompt in chunks",
        "decode steps after the long prompt in chunks",
    ]
    assert "no library" in report.notes
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == ["model.onnx"]


def test_triangle_layers_that_do_not_rotate_keep_the_function(tmp_path: Path) -> None:
    """Only dense layers rotate here, and they become GroupQueryAttention: nothing is folded."""
    model = ir.load(tiny_model("qwen3", GQA_ROUTE).path)
    node = [node for node in model.graph if node.op_type == "GroupQueryAttention"][1]
    node.attributes.add(ir.AttrInt64("do_rotary", 0))
    node.resize_inputs(7)
    source = tmp_path / "model.onnx"
    ir.save(ir.external_data.load_to_model(model), source)
    export_to(source, tmp_path / "out", layers=(1,), target="cuda", verify=True)
    exported = ir.load(tmp_path / "out" / "model.onnx")
    assert len(exported.functions) == 1
    ids = random_ids(1, 40)
    slow = Session.of(tmp_path / "out", kernel=False)
    assert_close(Session.of(tmp_path / "out").logits(ids), slow.logits(ids))


def test_caches_may_name_their_head_size(tmp_path: Path) -> None:
    """As genai's do, so that it has to be read off the projections."""
    model = ir.load(tiny_model("llama", GQA_ROUTE).path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([*list(value.shape)[:3], "kv_cache_dim"])
    source = tmp_path / "model.onnx"
    ir.save(ir.external_data.load_to_model(model), source)
    report = export_to(source, tmp_path / "out", layers=(1,), target="cuda", verify=True)
    assert len(report.verification) == 5
    export_to(tmp_path / "out" / "model.onnx", tmp_path / "again", layers=(1,), verify=True)


@pytest.mark.parametrize("target", ["cuda", "hopper"])
def test_a_folded_model_is_a_source_again(target: str, tmp_path: Path) -> None:
    source = tiny_model("llama", GQA_ROUTE).path
    export_to(source, tmp_path / "first", layers=(1, 2), target=target)
    export_to(tmp_path / "first" / "model.onnx", tmp_path / "again", layers=(1, 2))
    export_to(source, tmp_path / "cpu", layers=(1, 2))
    operators = _operators(tmp_path / "again")
    assert operators["TriangleAttention"] == 3
    assert operators["RotaryEmbedding"] == 6
    ids = random_ids(1, 40)
    assert_close(_logits(tmp_path / "again", ids), _logits(tmp_path / "cpu", ids))
