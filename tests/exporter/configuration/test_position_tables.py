"""How far a graph's tables of positions reach, by what chooses from them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.exporter.configuration.position_tables import table_length

_HEAD = """
<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
graph (int64[B, S] input_ids, int64[B, S] position_ids, int64[B, T] attention_mask,
       float[B, S, 64] x, float[B, 4, P, 16] past, int32[B] ends, int32 total,
       float[97, 64] embedding, float[300, 64] table, float[500, 8] cosines,
       float[1, 1, 200, 64] deep, float[32, 4] buckets) => (float[N] y)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] axis = {1}, int64[1] start = {0}>
{
"""
_TABLES = ("embedding", "table", "cosines", "deep", "buckets")
_SLOTS = """
    shape = Shape (attention_mask)
    length = Gather (shape, one)
    slots = Range (zero, length, one)
"""
_COUNTED = """
    counted = CumSum (attention_mask, one)
    real = Mul (counted, attention_mask)
"""
_PARTS = {
    "positions": ("y = Gather (table, position_ids)", 300),
    "ids": ("y = Gather (embedding, input_ids)", None),
    "slots": (_SLOTS + "y = Gather (table, slots)", 300),
    "wrapped": (
        "low = Less (position_ids, zero) more = Add (position_ids, two) "
        "at = Where (low, more, position_ids) y = Gather (table, at)",
        300,
    ),
    "counted": (_COUNTED + "at = Sub (real, one) y = Gather (table, at)", 300),
    "learned": (
        _COUNTED + "first = Sub (real, one) at = Add (first, two) y = Gather (table, at)",
        298,
    ),
    "cut": (
        "end = Shape <start = 1> (attention_mask) cut = Slice (deep, start, end) "
        "flat = Squeeze (cut) y = Gather (flat, position_ids)",
        200,
    ),
    "clamped": ("at = Min (position_ids, two) y = Gather (table, at)", None),
    "buckets": (
        _SLOTS + "column = Unsqueeze (slots, axis) distance = Sub (slots, column) "
        "far = Neg (distance) at = Min (far, two) y = Gather (buckets, at)",
        None,
    ),
    "heads": ("heads = Range (zero, two, one) y = Gather (table, heads)", None),
    "contrib": ("y = com.microsoft.RotaryEmbedding (x, position_ids, cosines, cosines)", 500),
    "inside": (
        "y, k, v = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 4, "
        "do_rotary = 1> (x, x, x, past, past, ends, total, cosines, cosines)",
        500,
    ),
    "shortest": (
        "a = com.microsoft.RotaryEmbedding (x, position_ids, cosines, cosines) "
        "b = Gather (table, position_ids) y = Add (a, b)",
        300,
    ),
}


@pytest.mark.parametrize("name", _PARTS)
def test_how_far_tables_reach(name: str) -> None:
    nodes, length = _PARTS[name]
    model = ir.from_onnx_text(_HEAD + nodes + "}")
    graph = model.graph
    for value in [value for value in graph.inputs if str(value.name) in _TABLES]:
        assert value.shape is not None
        graph.inputs.remove(value)
        value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)
        graph.register_initializer(value)
    assert table_length(graph) == length
