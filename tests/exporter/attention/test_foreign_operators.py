"""Attention by operators that no pattern reads is refused by name; layers that keep a state stay.

The operators are those of the installed ONNX Runtime and onnx, and those known of other versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from trianglemix.exporter.attention.sites import anchors_of
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.inspection import inspect_model
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_patterns

from tests.exporter.exports import Silent

_PATTERNS: Final = {pattern.name: pattern for pattern in all_patterns()}
_STATEFUL: Final = ("LinearAttention", "LinearAttentionGate")
_NEWER: Final = (
    "DynamicSparseAttention", "SparsePagedAttention", "SparseAttentionIndexer",
    "PackedSparseAttentionIndexer", "PagedAttention",
)  # fmt: skip


def _operators() -> list[tuple[str, str]]:
    schemas = [*get_all_operator_schema(), *onnx.defs.get_all_schemas()]
    found = {(schema.domain, schema.name) for schema in schemas if "Attention" in schema.name}
    found |= {("com.microsoft", name) for name in _NEWER}
    found.add(("my.company", "MyFastAttention"))
    known = anchors_of(list(_PATTERNS.values()))
    return sorted(x for x in found - known if x[1] not in _STATEFUL)


def _model(*, layers: int, domain: str, op_type: str) -> ir.Model:
    """The example of GroupQueryAttention with its first layers by another operator."""
    model = _PATTERNS["group_query_attention"].example().model
    model.graph.opset_imports.setdefault(domain, 1)
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in nodes[:layers]:
        node.domain, node.op_type = domain, op_type
    return model


def _refusal(model: ir.Model, folder: Path) -> str:
    ir.save(model, folder / "source.onnx")
    with pytest.raises(RefusedError) as error:
        export(ExportOptions(folder / "source.onnx", folder / "out", dense=True), Silent())
    return str(error.value)


@pytest.mark.parametrize(("domain", "op_type"), _operators(), ids=[x[1] for x in _operators()])
def test_one_layer_by_another_operator_is_named(domain: str, op_type: str, tmp_path: Path) -> None:
    reason = _refusal(_model(layers=1, domain=domain, op_type=op_type), tmp_path)
    assert f"{op_type} " in reason
    assert "GroupQueryAttention: " in reason  # the node's own name


@pytest.mark.parametrize("layers", [1, 3])
def test_a_paged_graph_is_refused_by_its_operator(layers: int, tmp_path: Path) -> None:
    """Such a graph has no attention mask either, which is not the cause."""
    model = _model(layers=layers, domain="com.microsoft", op_type="PagedAttention")
    mask = next(x for x in model.graph.inputs if x.name == "attention_mask")
    mask.name = "block_table"
    assert "in pages of a block table" in _refusal(model, tmp_path)


def test_the_inspection_lists_them(tmp_path: Path) -> None:
    model = _model(layers=1, domain="com.microsoft", op_type="SparseAttention")
    ir.save(model, tmp_path / "source.onnx")
    inspection = inspect_model(tmp_path / "source.onnx")
    assert len(inspection.sites.found) == 2
    assert any("SparseAttention" in miss.reason for miss in inspection.sites.near_misses)


def _hybrid(*, attentions: bool) -> ir.Model:
    """The example with a LinearAttention before its layers, or instead of them."""
    model = _PATTERNS["group_query_attention"].example().model
    graph = model.graph
    first = next(node for node in graph if node.op_type == "GroupQueryAttention")
    rows = first.inputs[0]
    state = ir.Value(
        name="past_state", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4, 32])
    )
    graph.inputs.append(state)
    linear = ir.Node(
        "com.microsoft", "LinearAttention", [rows, rows, rows, state],
        [ir.AttrInt64("q_num_heads", 4), ir.AttrInt64("kv_num_heads", 4)], num_outputs=2,
    )  # fmt: skip
    linear.outputs[0].name, linear.outputs[1].name = "linear", "present_state"
    linear.outputs[1].type, linear.outputs[1].shape = state.type, state.shape
    graph.insert_before(first, linear)
    first.replace_input_with(0, linear.outputs[0])
    graph.outputs.append(linear.outputs[1])
    if not attentions:
        for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
            node.op_type = "LinearAttention"
    return model


def test_layers_that_keep_a_state_stay_and_are_told(tmp_path: Path) -> None:
    ir.save(_hybrid(attentions=True), tmp_path / "source.onnx")
    report = export(ExportOptions(tmp_path / "source.onnx", tmp_path / "out", dense=True), Silent())
    assert any("1 LinearAttention nodes stay" in note for note in report.notes)
    nodes = [node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert "LinearAttention" in nodes


def test_states_alone_are_no_attention(tmp_path: Path) -> None:
    reason = _refusal(_hybrid(attentions=False), tmp_path)
    assert "(LinearAttention) keeps a state" in reason


def test_attention_inside_a_branch_is_named(tmp_path: Path) -> None:
    model = _PATTERNS["group_query_attention"].example().model
    graph = model.graph
    node = next(node for node in graph if node.op_type == "GroupQueryAttention")
    branches = []
    for name in ("then", "else"):
        copy = ir.Node(
            node.domain, node.op_type, list(node.inputs), list(node.attributes.values()),
            num_outputs=3, name=f"{name}_attention",
        )  # fmt: skip
        for index, value in enumerate(copy.outputs):
            value.name = f"{name}_{index}"
            value.type, value.shape = node.outputs[index].type, node.outputs[index].shape
        branches.append(ir.Graph([], copy.outputs, nodes=[copy], name=name))
    condition = ir.node("Greater", [node.inputs[6], node.inputs[6]])
    chosen = ir.Node("", "If", [condition.outputs[0]], [
        ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1]),
    ], num_outputs=3)  # fmt: skip
    graph.insert_before(node, [condition, chosen])
    for old, new in zip(node.outputs, chosen.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"old_{old.name}"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node)
    assert "branch" in _refusal(model, tmp_path)
