"""Reads keys and values of an attention node: their heads, and a cache appended before the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.attention.head_trace import Heads, trace_heads
from trianglemix.exporter.attention.sites import LAYOUTS, Layout, MatchContext, Operand
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import optional_input, producer_of, static_size

_WITH_PRESENTS: Final = ("Attention", "MultiHeadAttention", "GroupQueryAttention")


@dataclass(frozen=True)
class KeysAndValues:
    """New tokens, and the cache that they are appended to (None without one), with its layouts."""

    key: Operand
    value: Operand
    past: tuple[ir.Value, ir.Value] | None
    present: tuple[ir.Value, ir.Value] | None
    layouts: tuple[Layout, Layout] = (Layout.BHSD, Layout.BHSD)


def keys_and_values(
    node: ir.Node, operands: tuple[Operand, Operand], past: tuple[int, int], context: MatchContext
) -> KeysAndValues:
    """Keys and values with the cache inside the node (its inputs `past`), or else before it.

    Raises:
        CutError: see `find_appended`.
    """
    past_key, past_value = (optional_input(node, index) for index in past)
    if past_key is None or past_value is None:
        return find_appended(*operands, context)
    return KeysAndValues(*operands, (past_key, past_value), (node.outputs[1], node.outputs[2]))


def find_appended(key: Operand, value: Operand, context: MatchContext) -> KeysAndValues:
    """Walks back from a node's keys and values through repeats and reshapes to an append.

    Raises:
        CutError: keys and values do not come the same way, or are scaled on it.
    """
    found = [_trace(operand, context) for operand in (key, value)]
    appended = [heads for heads in found if heads is not None and heads.past is not None]
    if not appended:
        return KeysAndValues(key, value, None, None)
    if len(appended) == 1:
        raise CutError("only one of keys and values is appended to a cache")
    if any(heads.factors for heads in appended):
        raise CutError("its keys or values are scaled between the cache and the attention")
    (past_key, joined_key), (past_value, joined_value) = (_cache(heads) for heads in appended)
    layouts = (LAYOUTS[appended[0].axes], LAYOUTS[appended[1].axes])
    return KeysAndValues(
        Operand(appended[0].value, layouts[0]),
        Operand(appended[1].value, layouts[1]),
        (past_key, past_value),
        (joined_key, joined_value),
        layouts,
    )


def _trace(operand: Operand, context: MatchContext) -> Heads | None:
    if operand.layout is Layout.BHSD:
        return _own(trace_heads(operand.value, "BHTD", context.content))
    merge = producer_of(operand.value, "Reshape")
    apart = merge.inputs[0] if merge else None
    if apart is None or (rank(apart) != 4 and producer_of(apart, "Transpose") is None):
        return None
    return _own(trace_heads(apart, "BTHD", context.content))


def _own(heads: Heads) -> Heads:
    """The heads, unless they are what another attention node has appended to its cache."""
    node = heads.value.producer()
    if node is not None and node.op_type in _WITH_PRESENTS and heads.value is not node.outputs[0]:
        raise CutError(
            f"its keys or values are the present of {node.name or node.op_type}, an earlier layer "
            "that appends inside its node; export such layers with the append outside (a Concat "
            "before the attention)"
        )
    return heads


def _cache(heads: Heads) -> tuple[ir.Value, ir.Value]:
    assert heads.past is not None
    assert heads.joined is not None
    return heads.past, heads.joined


def head_shape(num_heads: int, kv_num_heads: int, cached: KeysAndValues) -> AttentionShape:
    """Head layout; `kv_num_heads` 0 where only the cache or the new tokens can say it.

    Raises:
        ConfigurationError: the file does not say it, or sizes that the operator does not take.
    """
    kv_heads = _stated(cached, 0, "H") or kv_num_heads
    sizes = [_stated(cached, index, "D") or _width(cached, index, kv_heads) for index in range(2)]
    if not num_heads or not kv_heads or sizes[0] is None or sizes[1] is None:
        raise ConfigurationError("the file does not say how many heads of which size it has")
    return AttentionShape(num_heads, kv_heads, sizes[0], sizes[1])


def _stated(cached: KeysAndValues, index: int, axis: str) -> int | None:
    """Size of axis H or D of keys (0) or values (1), from the cache or the new tokens."""
    operand = (cached.key, cached.value)[index]
    past = None if cached.past is None else cached.past[index]
    for value, layout in ((past, cached.layouts[index]), (operand.value, operand.layout)):
        size = None if layout is Layout.FLAT else static_size(value, layout.value.index(axis))
        if size is not None:
            return size
    return None


def _width(cached: KeysAndValues, index: int, kv_heads: int) -> int | None:
    """Head size of keys (0) or values (1) that come as `[B, S, G*D]`."""
    operand = (cached.key, cached.value)[index]
    width = static_size(operand.value, 2) if operand.layout is Layout.FLAT else None
    return width // kv_heads if width and kv_heads and width % kv_heads == 0 else None
