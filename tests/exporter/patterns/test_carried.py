"""Whatever an attention operator has that is not carried is refused by its name, known or not.

The operators' inputs and attributes are those of the installed ONNX Runtime and onnx, so that a
new version of them brings new cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from trianglemix.exporter.attention.sites import AttentionSite, MatchContext, Refusal
from trianglemix.exporter.graph.roles import find_roles
from trianglemix.exporter.registry import all_patterns

_PATTERNS: Final = {pattern.name: pattern for pattern in all_patterns()}
_OPERATORS: Final = {
    "GroupQueryAttention": "group_query_attention",
    "MultiHeadAttention": "multi_head_attention",
    "Attention": "attention",
}
_CARRIED_INPUTS: Final = {
    "GroupQueryAttention": {
        "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
        "cos_cache", "sin_cache", "q_norm_weight", "k_norm_weight",
    },
    "MultiHeadAttention": {"query", "key", "value", "key_padding_mask", "attention_bias",
                           "past_key", "past_value"},
    "Attention": {"Q", "K", "V", "attn_mask", "past_key", "past_value"},
}  # fmt: skip
_CARRIED_ATTRIBUTES: Final = {
    "GroupQueryAttention": {
        "num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary",
        "rotary_interleaved", "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon",
    },
    "MultiHeadAttention": {"num_heads", "scale", "unidirectional"},
    "Attention": {"is_causal", "q_num_heads", "kv_num_heads", "scale", "softcap",
                  "softmax_precision", "qk_matmul_output_mode", "left_window_size",
                  "right_window_size"},
}  # fmt: skip


def _schemas() -> dict[str, tuple[list[str], set[str]]]:
    """Names of inputs, in order, and of attributes, in the newest of both packages."""
    found: dict[str, tuple[list[str], set[str]]] = {}
    known = [*get_all_operator_schema(), *onnx.defs.get_all_schemas()]
    for schema in known:
        if schema.name in _OPERATORS and (schema.domain, schema.name) != (
            "com.microsoft",
            "Attention",
        ):
            inputs, attributes = found.get(schema.name, ([], set()))
            names = [given.name for given in schema.inputs]
            longest = max(names, inputs, key=len)
            found[schema.name] = (longest, attributes | set(schema.attributes))
    return found


def _inputs() -> Iterator[tuple[str, int, str]]:
    """Inputs that must be refused, with the word for them."""
    for operator, (names, _) in sorted(_schemas().items()):
        for index, name in enumerate(names):
            if name not in _CARRIED_INPUTS[operator]:
                yield operator, index, name
        yield operator, len(names) + 7, f"{len(names) + 7} (extra)"


def _attributes() -> Iterator[tuple[str, str]]:
    for operator, (_, names) in sorted(_schemas().items()):
        for name in sorted({*names, "of_a_version_to_come"} - _CARRIED_ATTRIBUTES[operator]):
            yield operator, name


def _matched(operator: str, model: ir.Model) -> AttentionSite | Refusal:
    graph = model.graph
    node = next(node for node in graph if node.op_type == operator)
    return _PATTERNS[_OPERATORS[operator]].match(node, MatchContext(graph, find_roles(graph)))


def _reason(operator: str, model: ir.Model) -> str:
    refusal = _matched(operator, model)
    assert isinstance(refusal, Refusal)
    assert refusal.is_attention
    return refusal.reason


def _example(operator: str) -> tuple[ir.Model, ir.Node]:
    model = _PATTERNS[_OPERATORS[operator]].example().model
    return model, next(node for node in model.graph if node.op_type == operator)


def _give(model: ir.Model, node: ir.Node, index: int) -> None:
    extra = ir.Value(name="extra", const_value=ir.tensor(np.ones(4, np.float32), name="extra"))
    model.graph.register_initializer(extra)
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, extra)


@pytest.mark.parametrize(("operator", "index", "word"), list(_inputs()))
def test_an_input_without_a_counterpart_is_named(operator: str, index: int, word: str) -> None:
    model, node = _example(operator)
    _give(model, node, index)
    assert f"its input {word} " in _reason(operator, model)


def test_positions_that_no_rotation_reads_may_stand_there() -> None:
    model, node = _example("GroupQueryAttention")
    node.attributes.pop("do_rotary")
    _give(model, node, 9)
    assert isinstance(_matched("GroupQueryAttention", model), AttentionSite)


@pytest.mark.parametrize(("operator", "name"), list(_attributes()))
def test_an_attribute_without_a_counterpart_is_named(operator: str, name: str) -> None:
    model, node = _example(operator)
    node.attributes[name] = ir.AttrInt64(name, 77)
    reason = _reason(operator, model)
    assert name in reason
    assert "77" in reason or name == "sliding_window_cache"


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        ("GroupQueryAttention", "local_window_size", 0),
        ("GroupQueryAttention", "local_window_size", -7),
        ("GroupQueryAttention", "causal", 0),
        ("GroupQueryAttention", "smooth_softmax", 1),
        ("GroupQueryAttention", "k_quant_type", "PER_CHANNEL"),
        ("GroupQueryAttention", "do_rotary", 2),
        ("Attention", "is_causal", 2),
        ("Attention", "softmax_precision", 4),
        ("MultiHeadAttention", "mask_filter_value", -5.0),
    ],
)
def test_a_value_without_a_meaning_here_is_named(operator: str, name: str, value: Any) -> None:
    model, node = _example(operator)
    node.attributes[name] = ir.convenience.convert_attribute(name, value)
    assert f"its attribute {name}={value}" in _reason(operator, model)


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("GroupQueryAttention", {"causal": 1, "smooth_softmax": 0, "qk_output": 0, "softcap": 0.0,
                                 "kv_cache_bit_width": 0, "k_quant_type": "NONE",
                                 "v_quant_type": "NONE", "local_window_size": -1,
                                 "sliding_window_cache": 0}),
        ("MultiHeadAttention", {"mask_filter_value": -1e4, "unidirectional": 0}),
        ("Attention", {"qk_matmul_output_mode": 0, "softcap": 0.0, "is_causal": 0}),
    ],
)  # fmt: skip
def test_a_documented_default_may_stand_there(operator: str, attributes: dict[str, Any]) -> None:
    model, node = _example(operator)
    for name, value in attributes.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, value)
    site = _matched(operator, model)
    assert isinstance(site, AttentionSite), site
    assert site.mask.window is None


@pytest.mark.parametrize("operator", sorted(_OPERATORS))
def test_scores_that_are_read_are_named(operator: str) -> None:
    model, node = _example(operator)
    node.resize_outputs(4)
    scores = node.outputs[3]
    scores.name, scores.type = "scores", ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(scores)
    assert "which TriangleAttention never makes" in _reason(operator, model)


@pytest.mark.parametrize("window", [None, 5, 300])
def test_a_key_padding_mask_by_row_is_seen_far_away(window: int | None) -> None:
    """`[B, S, T]` instead of the additive mask: it is looked at as far as any other operand."""
    model, node = _example("MultiHeadAttention")
    graph = model.graph
    added = node.inputs[5]
    where = added.producer() if added is not None else None
    assert where is not None
    shown = where.inputs[0]
    if window is not None:
        shown = _near(graph, where, window)
    flat = ir.Value(name="head", const_value=ir.tensor(np.array([1]), name="head"))
    graph.register_initializer(flat)
    cast = ir.node("Cast", [shown], attributes={"to": int(ir.DataType.INT32)})
    rows = ir.node("Squeeze", [cast.outputs[0], flat])
    graph.insert_before(node, [cast, rows])
    node.replace_input_with(4, rows.outputs[0])
    node.replace_input_with(5, None)
    site = _matched("MultiHeadAttention", model)
    assert isinstance(site, AttentionSite), site
    assert site.mask.window == window


def _near(graph: ir.Graph, where: ir.Node, window: int) -> ir.Value:
    """The example's bool mask `[B, 1, S, T]`, and keys that are nearer than `window`."""
    compare = next(node for node in graph if node.op_type == "LessOrEqual")
    key, row = compare.inputs
    width = ir.Value(name="width", const_value=ir.tensor(np.array(window), name="width"))
    graph.register_initializer(width)
    reach = ir.node("Sub", [row, width])
    near = ir.node("Greater", [key, reach.outputs[0]])
    both = ir.node("And", [where.inputs[0], near.outputs[0]])
    graph.insert_before(where, [reach, near, both])
    return both.outputs[0]
