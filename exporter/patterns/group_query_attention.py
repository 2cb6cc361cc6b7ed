"""`com.microsoft::GroupQueryAttention`, as onnxruntime-genai's and other builders write it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Example,
    Layout,
    MaskClass,
    MatchContext,
    NodeLengths,
    Operand,
)
from trianglemix.exporter.graph.rotation import Rotation, head_size, rotate, slot_positions, unpack
from trianglemix.exporter.graph.walk import needed_input, optional_input
from trianglemix.exporter.patterns import _example
from trianglemix.exporter.patterns._carried import Carried, anything, at_least, only
from trianglemix.exporter.patterns._lengths import check_lengths
from trianglemix.exporter.patterns._node_walk import keys_and_values
from trianglemix.exporter.patterns._site_pattern import (
    SitePattern,
    cache_trouble,
    packing_trouble,
)

_DOMAIN: Final = "com.microsoft"
_QUERY, _KEY, _VALUE, _PAST = 0, 1, 2, (3, 4)
_SEQLENS, _TOTAL, _COS, _SIN = 5, 6, 7, 8
_Q_NORM, _K_NORM = 14, 15
_NORM_EPSILON: Final = 1e-6  # the attribute's default
_NO_WINDOW: Final = -1
"""`local_window_size` of a node without a window. Any other `W` keeps `W` keys, as documented."""
_EPSILONS: Final = {_Q_NORM: "q_norm_epsilon", _K_NORM: "k_norm_epsilon"}
_CARRIED: Final = Carried(
    inputs=("query", "key", "value", "past_key", "past_value", "seqlens_k",
            "total_sequence_length", "cos_cache", "sin_cache", "position_ids", "attention_bias",
            "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight", "query_seqlens"),
    outputs=("output", "present_key", "present_value", "output_qk"),
    refused={
        "position_ids": "gives positions of its own to the rotation inside, of which ONNX Runtime "
        "reads the first alone in a prompt; export with the rotation before the attention, or "
        "without position_ids",
        **dict.fromkeys(("attention_bias", "head_sink", "k_scale", "v_scale"), ""),
        **dict.fromkeys(("query_seqlens", "output_qk"), ""),
    },
    attributes={
        "num_heads": at_least(1),
        "kv_num_heads": at_least(1),
        "scale": anything,
        "softcap": at_least(0.0),
        "local_window_size": lambda window: window == _NO_WINDOW or window >= 1,
        "do_rotary": only(0, 1),
        "rotary_interleaved": only(0, 1),
        "qk_norm_epsilon": anything,
        "q_norm_epsilon": anything,
        "k_norm_epsilon": anything,
        "sliding_window_cache": only(0),
        "smooth_softmax": only(0, -1),
        "qk_output": only(0),
        "causal": only(1),
        "kv_cache_bit_width": only(0),
        "k_quant_type": only("NONE"),
        "v_quant_type": only("NONE"),
    },
)  # fmt: skip
_UNROTATED: Final = replace(
    _CARRIED, refused={x: why for x, why in _CARRIED.refused.items() if x != "position_ids"}
)
"""Only the rotation reads positions."""


class GroupQueryAttentionPattern(SitePattern):
    """Anchors on the node; a rotation inside it becomes two nodes before it."""

    name = "group_query_attention"
    anchors = frozenset({(_DOMAIN, "GroupQueryAttention")})

    def trouble(self, node: ir.Node) -> str | None:
        return (
            _window_trouble(node)
            or (_CARRIED if _rotates(node) else _UNROTATED).trouble(node)
            or packing_trouble(node)
            or _past_trouble(node)
            or cache_trouble(node, _PAST)
            or _table_trouble(node)
        )

    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        shape = _head_shape(node)
        build = context.builder(node)
        seqlens, total = _lengths(node, context, build)
        query, key, value = _projections(node, shape, build)
        query = _normed(node, _Q_NORM, query, shape, build)
        key = _normed(node, _K_NORM, key, shape, build)
        if _rotates(node):
            query = _turned(node, query, shape.num_heads, context, build)
            key = _turned(node, key, shape.kv_num_heads, context, build)
        operands = (Operand(key, Layout.FLAT), Operand(value, Layout.FLAT))
        cached = keys_and_values(node, operands, _PAST, context)
        window = node.attributes.get_int("local_window_size", _NO_WINDOW)
        return replace(
            self.site(node, shape, Operand(query, Layout.FLAT), cached),
            mask=MaskClass(None if window == _NO_WINDOW else window),
            lengths=NodeLengths(seqlens, total),
            prologue=tuple(build.nodes),
        )

    def example(self) -> Example:
        return _example.build_example(_example.group_query_attention, opset=21, domains=(_DOMAIN,))


PATTERN: Final = GroupQueryAttentionPattern()


def _past_trouble(node: ir.Node) -> str | None:
    for index, name in zip(_PAST, ("past_key", "past_value"), strict=True):
        if optional_input(node, index) is None:
            return f"it has no input {name}"
    return None


def _window_trouble(node: ir.Node) -> str | None:
    """Why the node's window is not a sliding one over a whole cache, if so."""
    if node.attributes.get_int("sliding_window_cache", 0):
        return (
            "its cache is a ring of the size of its window (sliding_window_cache=1), which "
            "TriangleAttention cannot read; build the model with full caches "
            "(genai's builder: --extra_options windowed_kv_cache=false)"
        )
    if node.attributes.get_int("local_window_size", _NO_WINDOW) == 0:
        return (
            "its attribute local_window_size=0 is a window without keys: ONNX Runtime lets a row "
            "see itself alone up to 1.23, and nothing since; -1 stands for no window"
        )
    return None


def _table_trouble(node: ir.Node) -> str | None:
    if _rotates(node) and any(optional_input(node, index) is None for index in (_COS, _SIN)):
        return "it rotates without cos_cache and sin_cache"
    return None


def _rotates(node: ir.Node) -> bool:
    do_rotary: int = node.attributes.get_int("do_rotary", 0)
    return do_rotary == 1


def _head_shape(node: ir.Node) -> AttentionShape:
    heads, kv_heads = (int(node.attributes[x].value) for x in ("num_heads", "kv_num_heads"))
    packed = heads + 2 * kv_heads if node.inputs[_KEY] is None else heads
    cosines = optional_input(node, _COS) if _rotates(node) else None
    size = head_size(node.inputs[_PAST[0]], node.inputs[_QUERY], packed, cosines)
    if size is None:
        raise ConfigurationError("the file does not say the size of its heads")
    return AttentionShape(heads, kv_heads, size, size)


def _projections(
    node: ir.Node, shape: AttentionShape, build: GraphBuilder
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values `[B, S, heads*D]`, split if they come packed."""
    query, key, value = node.inputs[:3]
    assert query is not None
    if key is not None and value is not None:
        return query, key, value
    return unpack(build, query, shape)


def _normed(
    node: ir.Node, index: int, rows: ir.Value, shape: AttentionShape, build: GraphBuilder
) -> ir.Value:
    """The per-head RMS norm that the node did inside, before it rotated."""
    weight = optional_input(node, index)
    if weight is None:
        return rows
    both = node.attributes.get_float("qk_norm_epsilon", _NORM_EPSILON)
    epsilon = node.attributes.get_float(_EPSILONS[index], both)
    return _head_norm(build, rows, weight, shape.head_size, epsilon)


def _head_norm(
    build: GraphBuilder, rows: ir.Value, weight: ir.Value, head_size: int, epsilon: float
) -> ir.Value:
    """`x / sqrt(mean(x^2) + epsilon) * weight` of each head of `[B, S, heads*D]`; `weight [D]`.

    The mean is taken in float32, as the CUDA kernel of GroupQueryAttention does.
    """
    heads = build.reshape(rows, 0, 0, -1, head_size)
    wide = build.cast(heads, ir.DataType.FLOAT)
    square = build.op("Mul", wide, wide)
    mean = build.reduce("ReduceMean", square, -1, keepdims=1)
    root = build.op("Sqrt", build.op("Add", mean, build.scalar(epsilon)))
    normed = build.op("Div", wide, root)
    scaled = build.op("Mul", build.op("CastLike", normed, weight), weight)
    return build.reshape(scaled, 0, 0, -1)


def _lengths(
    node: ir.Node, context: MatchContext, build: GraphBuilder
) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k [B]` and the total length, checked; GroupQueryAttention also reads `[B, 1]`."""
    seqlens, total = needed_input(node, _SEQLENS), needed_input(node, _TOTAL)
    if check_lengths(seqlens, total, context) == 1:
        return seqlens, total
    key = ("seqlens_k", seqlens)
    if key not in context.shared:
        context.shared[key] = build.reshape(seqlens, -1)
    return context.shared[key], total


def _turned(
    node: ir.Node, rows: ir.Value, heads: int, context: MatchContext, build: GraphBuilder
) -> ir.Value:
    """The rotation that the node did inside, at positions that layers of the same lengths share."""
    seqlens = needed_input(node, _SEQLENS)
    key = ("positions", seqlens)
    if key not in context.shared:
        flat = context.shared.get(("seqlens_k", seqlens), seqlens)
        context.shared[key] = slot_positions(build, flat, context.roles.input_ids)
    rotation = Rotation(
        needed_input(node, _COS),
        needed_input(node, _SIN),
        node.attributes.get_int("rotary_interleaved", 0) == 1,
    )
    size = _head_shape(node).head_size
    return rotate(build, rows, (heads, size), rotation, context.shared[key])
