"""What a graph may carry besides plain attention: kept exactly, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_patterns

from tests.sources.cell import SilentObserver
from tests.sources.comparison import Feeding, Outcome, compare_models

_PATTERNS: Final = {pattern.name: pattern for pattern in all_patterns()}
_GQA, _ATTENTION, _MHA = "group_query_attention", "attention", "multi_head_attention"
_OWN = "triangle_attention"
Change = Callable[[ir.Model], None]


def _export(model: ir.Model, folder: Path) -> tuple[Path, Path]:
    source, output = folder / "source.onnx", folder / "out"
    ir.save(model, source)
    options = ExportOptions(
        source, output, pattern=PatternRequest(0, -1, 1), layers=LayerRequest(start_layer=0)
    )
    export(options, SilentObserver())
    return source, output / "model.onnx"


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(ir.tensor(array).dtype), ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def _with_input(op_type: str, index: int) -> Change:
    def change(model: ir.Model) -> None:
        extra = _constant(model, "extra", np.ones(4, np.float32))
        for node in _nodes(model, op_type):
            node.resize_inputs(max(len(node.inputs), index + 1))
            node.replace_input_with(index, extra)

    return change


def _with_attribute(op_type: str, name: str, number: int) -> Change:
    def change(model: ir.Model) -> None:
        for node in _nodes(model, op_type):
            node.attributes[name] = ir.AttrInt64(name, number)

    return change


def _rewired(op_type: str, index: int, source: Callable[[ir.Model, ir.Node], ir.Value]) -> Change:
    def change(model: ir.Model) -> None:
        for node in _nodes(model, op_type):
            node.replace_input_with(index, source(model, node))

    return change


def _without_value(model: ir.Model) -> None:
    for node in _nodes(model, "TriangleAttention"):
        node.replace_input_with(2, None)


def _too_wide(model: ir.Model) -> None:
    for node in _nodes(model, "GroupQueryAttention"):
        packed = node.inputs[0]
        assert packed is not None
        packed.type = ir.TensorType(ir.DataType.FLOAT)
        packed.shape = ir.Shape(["batch", "sequence", 77])


def _first_input(model: ir.Model, node: ir.Node) -> ir.Value:
    return model.graph.inputs[0]


def _own_query(model: ir.Model, node: ir.Node) -> ir.Value:
    query = node.inputs[0]
    assert query is not None
    return query


def _past_key(model: ir.Model, node: ir.Node) -> ir.Value:
    return next(value for value in model.graph.inputs if "key" in str(value.name))


def _with_bias(op_type: str, index: int) -> Change:
    """A slope over the keys on top of the mask, as ALiBi has it."""

    def change(model: ir.Model) -> None:
        for number, node in enumerate(_nodes(model, op_type)):
            mask = node.inputs[index]
            assert mask is not None
            slope = _constant(model, f"slope_{number}", np.full((1, 4, 1, 1), 0.25, np.float32))
            cast = ir.node("Cast", [model.graph.inputs[1]], attributes={"to": 1})
            place = ir.node("CumSum", [cast.outputs[0], _axis(model)])
            wide = ir.node("Unsqueeze", [place.outputs[0], _axes(model)])
            bias = ir.node("Mul", [wide.outputs[0], slope])
            total = ir.node("Add", [mask, bias.outputs[0]])
            model.graph.insert_before(node, [cast, place, wide, bias, total])
            node.replace_input_with(index, total.outputs[0])

    return change


def _axis(model: ir.Model) -> ir.Value:
    found = model.graph.initializers.get("axis")
    return found if found is not None else _constant(model, "axis", np.array(1, np.int64))


def _axes(model: ir.Model) -> ir.Value:
    found = model.graph.initializers.get("axes")
    return found if found is not None else _constant(model, "axes", np.array([1, 2], np.int64))


def _embedded(model: ir.Model) -> None:
    """Rows of an embedding in place of token ids."""
    (lookup,) = (node for node in model.graph.inputs[0].consumers() if node.op_type == "Gather")
    rows = ir.Value(
        name="inputs_embeds",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(["batch", "length", 8]),
    )
    lookup.outputs[0].replace_all_uses_with(rows)
    model.graph.inputs[0] = rows


def _merged(model: ir.Model) -> None:
    """The logits come from a branch with weights in it, as in a merged decoder."""
    branches = []
    for name in ("then", "else"):
        hidden = model.graph.outputs[0].producer()
        assert hidden is not None
        weight = _constant(model, f"weight_{name}", np.eye(61, dtype=np.float32))
        product = ir.node("MatMul", [model.graph.outputs[0], weight])
        product.outputs[0].name = f"product_{name}"
        branches.append(ir.Graph([], product.outputs, nodes=[product], name=name))
    condition = _constant(model, "condition", np.array(True))
    node = ir.Node("", "If", [condition], [
        ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1]),
    ], name="optimum::if")  # fmt: skip
    old = model.graph.outputs[0]
    old.name = "inner"
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        "logits",
        old.type,
        old.shape,
    )
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]


_REFUSED: Final[list[tuple[str, Change, str]]] = [
    (_GQA, _with_input("GroupQueryAttention", 10), "attention_bias"),
    (_GQA, _with_input("GroupQueryAttention", 11), "head_sink"),
    (_GQA, _with_input("GroupQueryAttention", 12), "k_scale"),
    (_GQA, _with_input("GroupQueryAttention", 16), "query_seqlens"),
    (_GQA, _with_input("GroupQueryAttention", 17), "its input 17 .extra. is not one"),
    (_GQA, _with_attribute("GroupQueryAttention", "local_window_size", 0), "local_window_size=0"),
    (_GQA, _with_attribute("GroupQueryAttention", "smooth_softmax", 1), "smooth_softmax"),
    (_GQA, _with_attribute("GroupQueryAttention", "kv_cache_bit_width", 8), "kv_cache_bit_width"),
    (_GQA, _with_attribute("GroupQueryAttention", "sliding_window_cache", 1), "windowed_kv_cache"),
    (_GQA, _with_attribute("GroupQueryAttention", "causal", 0), "causal"),
    (_ATTENTION, _with_input("Attention", 6), "nonpad_kv_seqlen"),
    (_ATTENTION, _with_bias("Attention", 3), "attention bias"),
    (_MHA, _with_input("MultiHeadAttention", 3), "bias"),
    (_MHA, _with_bias("MultiHeadAttention", 5), "attention bias"),
    (_GQA, _rewired("GroupQueryAttention", 1, _own_query), "only one of key and value"),
    (_GQA, _rewired("GroupQueryAttention", 5, _past_key), "given to the graph"),
    (_GQA, _too_wide, "77 wide"),
    (_OWN, _without_value, "only one of key and value"),
    (_OWN, _rewired("TriangleAttention", 3, _first_input), "does not say the head size"),
    ("softmax", _embedded, "inputs_embeds"),
    ("softmax", _merged, "merged decoder"),
]


@pytest.mark.parametrize(("pattern", "change", "word"), _REFUSED, ids=[x[2] for x in _REFUSED])
def test_is_refused_by_its_name(pattern: str, change: Change, word: str, tmp_path: Path) -> None:
    model = _PATTERNS[pattern].example().model
    change(model)
    with pytest.raises(RefusedError, match=word):
        _export(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_lengths_with_two_axes_are_carried(tmp_path: Path) -> None:
    model = _PATTERNS[_GQA].example().model
    for node in _nodes(model, "ReduceSum"):
        node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
    outcome, detail = compare_models(*_export(model, tmp_path), Feeding.of(model))
    assert outcome is Outcome.SAME, detail


def test_nodes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """ONNX Runtime refuses such a file; names of nodes mean nothing."""
    model = _PATTERNS[_GQA].example().model
    for node in _nodes(model, "MatMul")[-3:]:
        node.name = "product"
    outcome, detail = compare_models(*_export(model, tmp_path), Feeding.of(model))
    assert outcome is Outcome.SAME, detail


@pytest.mark.parametrize(
    ("attributes", "epsilons"),
    [
        ({}, (1e-6, 1e-6)),
        ({"qk_norm_epsilon": 0.5}, (0.5, 0.5)),
        ({"qk_norm_epsilon": 0.5, "q_norm_epsilon": 0.1}, (0.1, 0.5)),
        ({"q_norm_epsilon": 0.1, "k_norm_epsilon": 0.7}, (0.1, 0.7)),
    ],
)
def test_norms_inside_equal_norms_outside(
    attributes: dict[str, float], epsilons: tuple[float, float], tmp_path: Path
) -> None:
    """q_norm_weight and k_norm_weight, which ONNX Runtime has on CUDA only."""
    model = _PATTERNS[_GQA].example().model
    weight = _constant(model, "norm", np.full(16, 0.5, np.float32))
    for node in _nodes(model, "GroupQueryAttention"):
        node.resize_inputs(16)
        node.replace_input_with(14, weight)
        node.replace_input_with(15, weight)
        for name, epsilon in attributes.items():
            node.attributes[name] = ir.AttrFloat32(name, epsilon)
    inside = _export(model, tmp_path)[1]
    other = _PATTERNS[_GQA].example().model
    for node in _nodes(other, "GroupQueryAttention"):
        _norm_outside(other, node, epsilons)
    (tmp_path / "other").mkdir()
    outside = _export(other, tmp_path / "other")[0]
    outcome, detail = compare_models(outside, inside, Feeding.of(model))
    assert outcome is Outcome.SAME, detail


def _norm_outside(model: ir.Model, node: ir.Node, epsilons: tuple[float, float]) -> None:
    """The packed projection split, queries and keys normed by ONNX Runtime's own operator."""
    packed = node.inputs[0]
    assert packed is not None
    number = str(node.name).rsplit("/", 1)[-1]
    sizes = _constant(model, f"sizes_{number}", np.array([64, 32, 32], np.int64))
    split = ir.node("Split", [packed, sizes], attributes={"axis": -1}, num_outputs=3)
    new, rows = [split], [*split.outputs]
    for index in range(2):
        apart = _constant(model, f"apart_{number}_{index}", np.array([0, 0, -1, 16], np.int64))
        flat = _constant(model, f"flat_{number}_{index}", np.array([0, 0, -1], np.int64))
        scale = _constant(model, f"scale_{number}_{index}", np.full(16, 0.5, np.float32))
        heads = ir.node("Reshape", [rows[index], apart])
        normed = ir.node(
            "SimplifiedLayerNormalization", [heads.outputs[0], scale],
            attributes={"axis": -1, "epsilon": epsilons[index], "stash_type": 1},
        )  # fmt: skip
        merged = ir.node("Reshape", [normed.outputs[0], flat])
        new += [heads, normed, merged]
        rows[index] = merged.outputs[0]
    model.graph.insert_before(node, new)
    for index, value in enumerate(rows):
        node.replace_input_with(index, value)
