"""Keeps an attention as the operator in a static graph, for the route with a custom operator.

`TriangleAttention` appends to its cache, so its present has as many slots as its past only while
new rows fit behind it. Pads stand on the right of a call: the cache inputs get spare slots behind
the last real one, `total_sequence_length` is their number, and every shape is a number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.graph.attention_node import NEVER_LAST, append_operator
from trianglemix.exporter.targets.ascend.block_form import StaticCall, StaticInputs, StaticOutputs

_ALL_LAST: Final = 0  # i >= 0 - last holds for every row


class CustomForm:
    """Builds the attentions of one graph, as `BlockForm` does; `call.slots` counts spare slots.

    `start` is `[1]` int32, `dtype` the type of queries, keys and values.
    """

    def __init__(
        self, build: GraphBuilder, start: ir.Value, call: StaticCall, dtype: ir.DataType
    ) -> None:
        self._build, self._start, self._call, self._dtype = build, start, call, dtype
        self._end: ir.Value | None = None

    def banded(self, inputs: StaticInputs, attention: Attention) -> StaticOutputs:
        """Every row keeps sinks and window; no row belongs to the dense tail."""
        return self._attend(inputs, attention, NEVER_LAST)

    def dense(self, inputs: StaticInputs, attention: Attention) -> StaticOutputs:
        """Every row keeps every key before it, whatever the pattern says."""
        return self._attend(inputs, attention, _ALL_LAST)

    def _attend(
        self, inputs: StaticInputs, attention: Attention, prompt_length: int
    ) -> StaticOutputs:
        build, shape = self._build, attention.shape
        rows, slots, groups = self._call.rows, self._call.slots, shape.kv_num_heads
        node = append_operator(
            build,
            [
                inputs.query, inputs.key, inputs.value, inputs.past_key, inputs.past_value,
                self._seqlens(), *(build.int32([x]) for x in (slots, prompt_length, 0)),
            ],
            replace(attention, scale=attention.scale or float(shape.head_size**-0.5)),
        )  # fmt: skip
        sizes = (
            (1, rows, shape.num_heads * shape.value_head_size),
            (1, groups, slots, shape.head_size),
            (1, groups, slots, shape.value_head_size),
        )
        for value, name, dims in zip(node.outputs, contract.OUTPUTS, sizes, strict=True):
            value.name = f"{node.name}/{name}"
            value.type, value.shape = ir.TensorType(self._dtype), ir.Shape(dims)
        new_key, new_value = (
            build.transpose(build.reshape(part, 1, rows, groups, size), 0, 2, 1, 3)
            for part, size in (
                (inputs.key, shape.head_size),
                (inputs.value, shape.value_head_size),
            )
        )
        return StaticOutputs(node.outputs[0], new_key, new_value)

    def _seqlens(self) -> ir.Value:
        """`seqlens_k [1]`: the last new row's slot, pads included; made where it is first used."""
        if self._end is None:
            rows = self._build.int32([self._call.rows - 1])
            self._end = self._build.op("Add", self._start, rows)
        return self._end
