"""The operator in standard ONNX operators with static shapes: rows in blocks over a static cache.

A call has `S` new rows (positions `start .. start + S - 1`, whose keys and values are inputs of
their own) and a cache of `M` slots of which the first `start` hold keys. `start` is the only input
that changes from call to call; every shape is a number.

*Banded* rows (the rows of a triangle layer before its dense tail, and layers with a sliding window)
come in blocks of `Bq`. The keys of a block are the sinks and the `W' + Bq` keys that end with the
block's last row, `W'` the window rounded up to blocks: `O(S * (sink + window))` work and memory.
*Dense* rows see the whole cache, `Bq` rows at a time: `O(Bq * M)` memory. Masks come from
comparisons of positions, and every row keeps at least itself, so no row is empty. Rows after the
last real one (pads on the right) are computed and mean nothing: causality keeps them from all rows
before them. Only operators that mean the same from opset 13 to 18 are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.triangle.reference import Attention

MASKED_SCORE: Final = {
    ir.DataType.FLOAT: -3.0e38,
    ir.DataType.BFLOAT16: -3.0e38,
    ir.DataType.FLOAT16: -65504.0,
}
"""What stands for "not kept", by the graph's type. It replaces a score, it is never added to one:
in float16 the sum would overflow. In float16 graphs it is float16's lowest number although scores
are held in float32, so that a compiler that forces everything to float16 changes nothing."""


@dataclass(frozen=True)
class StaticCall:
    """Sizes of one static graph, in tokens: `rows` S, `slots` M, rows of a block.

    Raises:
        ConfigurationError: `rows` is not a multiple of a block.
    """

    rows: int
    slots: int
    banded_block: int
    dense_block: int

    def __post_init__(self) -> None:
        for name in ("banded_block", "dense_block"):
            block = getattr(self, name)
            if block < 1 or self.rows % block:
                raise ConfigurationError(
                    f"{name} is {block}, but must divide the {self.rows} rows of a call"
                )


@dataclass(frozen=True)
class StaticInputs:
    """`query [1, S, H*D]`, `key [1, S, G*D]`, `value [1, S, G*Dv]`, past `[1, G, M, D or Dv]`."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value


@dataclass(frozen=True)
class StaticOutputs:
    """`output [1, S, H*Dv]`, and the rows to be stored in the cache: `[1, G, S, D or Dv]`."""

    output: ir.Value
    new_key: ir.Value
    new_value: ir.Value


@dataclass(frozen=True)
class _Band:
    """Geometry of the banded form: `blocks` of `block` rows, `behind` keys before a block."""

    sink: int
    window: int
    block: int
    blocks: int

    @property
    def behind(self) -> int:
        """Keys before the block's first row; whole blocks, unless there is one block only."""
        reach = self.window - 1
        return reach if self.blocks == 1 else -(-reach // self.block) * self.block

    @property
    def keys(self) -> int:
        return self.sink + self.behind + self.block


class BlockForm:
    """Builds the attentions of one graph; equal masks and index vectors are made once.

    `start` is `[1]` int32, `dtype` the type of queries, keys and values.
    """

    def __init__(
        self, build: GraphBuilder, start: ir.Value, call: StaticCall, dtype: ir.DataType
    ) -> None:
        self._build, self._start, self._call, self._dtype = build, start, call, dtype
        self._made: dict[tuple[str, _Band | int], ir.Value] = {}

    def banded(self, inputs: StaticInputs, attention: Attention) -> StaticOutputs:
        """Every row keeps sinks and window; no row belongs to the dense tail.

        Raises:
            ConfigurationError: the pattern is the dense one, or the cache cannot hold the sinks.
        """
        pattern, block = attention.pattern, self._call.banded_block
        if pattern.is_dense:
            raise ConfigurationError("the banded form needs a window, but the pattern is dense")
        if pattern.num_sink_tokens > self._call.slots:
            raise ConfigurationError(
                f"{pattern.num_sink_tokens} sink tokens do not fit a cache of "
                f"{self._call.slots} slots; make the cache longer"
            )
        blocks = self._call.rows // block
        band = _Band(pattern.num_sink_tokens, pattern.sliding_window_size, block, blocks)
        new_key, new_value = self._new_rows(inputs, attention)
        shape, build = attention.shape, self._build
        groups, heads = shape.kv_num_heads, shape.num_heads // shape.kv_num_heads
        query = self._scaled(inputs.query, attention)
        query = build.reshape(query, blocks, block, groups, heads, shape.head_size)
        query = build.transpose(query, 2, 0, 3, 1, 4)
        query = build.reshape(query, groups, blocks, heads * block, shape.head_size)
        keys = self._banded_keys(band, inputs.past_key, new_key, (groups, shape.head_size))
        values = self._banded_keys(
            band, inputs.past_value, new_value, (groups, shape.value_head_size)
        )
        scores = build.op("MatMul", query, build.transpose(keys, 0, 1, 3, 2))
        scores = build.reshape(scores, groups, blocks, heads, block, band.keys)
        weights = self._softmax(scores, self._banded_mask(band), attention)
        weights = build.reshape(weights, groups, blocks, heads * block, band.keys)
        output = build.op("MatMul", weights, values)
        output = build.reshape(output, groups, blocks, heads, block, shape.value_head_size)
        output = build.transpose(output, 1, 3, 0, 2, 4)
        return StaticOutputs(self._merged(output, attention), new_key, new_value)

    def dense(self, inputs: StaticInputs, attention: Attention) -> StaticOutputs:
        """Every row keeps every key before it, whatever the pattern says."""
        new_key, new_value = self._new_rows(inputs, attention)
        shape, build, rows = attention.shape, self._build, self._call.rows
        groups, heads = shape.kv_num_heads, shape.num_heads // shape.kv_num_heads
        query = self._scaled(inputs.query, attention)
        query = build.reshape(query, rows, groups, heads, shape.head_size)
        query = build.transpose(query, 1, 2, 0, 3)  # [G, H/G, S, D]
        past = tuple(
            build.reshape(part, groups, self._call.slots, size)
            for part, size in (
                (inputs.past_key, shape.head_size),
                (inputs.past_value, shape.value_head_size),
            )
        )
        new = tuple(
            build.reshape(part, groups, rows, size)
            for part, size in ((new_key, shape.head_size), (new_value, shape.value_head_size))
        )
        past_columns = build.transpose(past[0], 0, 2, 1)
        parts = [
            self._dense_block(first, query, (past_columns, past[1]), new, attention)
            for first in range(0, rows, self._call.dense_block)
        ]
        output = build.transpose(build.concat(*parts, axis=2), 2, 0, 1, 3)
        return StaticOutputs(self._merged(output, attention), new_key, new_value)

    def _dense_block(
        self,
        first: int,
        query: ir.Value,
        past: tuple[ir.Value, ir.Value],
        new: tuple[ir.Value, ...],
        attention: Attention,
    ) -> ir.Value:
        """Rows `first .. first + Bq - 1`: `[G, H/G, Bq, Dv]`; new keys after them are left out."""
        build, shape = self._build, attention.shape
        block, slots = self._call.dense_block, self._call.slots
        groups, heads = shape.kv_num_heads, shape.num_heads // shape.kv_num_heads
        seen = first + block
        rows = build.slice(query, 2, first, seen) if block < self._call.rows else query
        rows = build.reshape(rows, groups, heads * block, shape.head_size)
        new_key, new_value = (
            build.slice(part, 1, 0, seen) if seen < self._call.rows else part for part in new
        )
        scores = build.concat(
            build.op("MatMul", rows, past[0]),
            build.op("MatMul", rows, build.transpose(new_key, 0, 2, 1)),
            axis=2,
        )
        scores = build.reshape(scores, groups, heads, block, slots + seen)
        weights = self._softmax(scores, self._dense_mask(first), attention)
        weights = build.reshape(weights, groups, heads * block, slots + seen)
        old = build.op("MatMul", build.slice(weights, 2, 0, slots), past[1])
        fresh = build.op("MatMul", build.slice(weights, 2, slots, slots + seen), new_value)
        summed = build.op("Add", old, fresh)
        return build.reshape(summed, groups, heads, block, shape.value_head_size)

    def _new_rows(self, inputs: StaticInputs, attention: Attention) -> tuple[ir.Value, ir.Value]:
        """New keys and values as the cache holds them: `[1, G, S, D]`, `[1, G, S, Dv]`."""
        shape = attention.shape
        new_key, new_value = (
            self._build.transpose(
                self._build.reshape(part, 1, self._call.rows, shape.kv_num_heads, size), 0, 2, 1, 3
            )
            for part, size in (
                (inputs.key, shape.head_size),
                (inputs.value, shape.value_head_size),
            )
        )
        return new_key, new_value

    def _scaled(self, query: ir.Value, attention: Attention) -> ir.Value:
        """Scaled before the product: in float16 the unscaled scores would overflow first."""
        scale = attention.scale or attention.shape.head_size**-0.5
        return self._build.op("Mul", query, self._build.scalar(scale, self._dtype))

    def _softmax(self, scores: ir.Value, kept: ir.Value, attention: Attention) -> ir.Value:
        """Weights in the graph's type, computed in float32."""
        build, real = self._build, ir.DataType.FLOAT
        if self._dtype != real:
            scores = build.cast(scores, real)
        if attention.softcap:
            cap = build.scalar(attention.softcap, real)
            scores = build.op("Mul", build.op("Tanh", build.op("Div", scores, cap)), cap)
        floor = build.scalar(MASKED_SCORE[self._dtype], real)
        weights = build.op("Softmax", build.op("Where", kept, scores, floor), axis=-1)
        return weights if self._dtype == real else build.cast(weights, self._dtype)

    def _merged(self, output: ir.Value, attention: Attention) -> ir.Value:
        shape = attention.shape
        return self._build.reshape(
            output, 1, self._call.rows, shape.num_heads * shape.value_head_size
        )

    def _banded_keys(
        self, band: _Band, past: ir.Value, new: ir.Value, sizes: tuple[int, int]
    ) -> ir.Value:
        """Keys or values of every block, sinks first: `[G, blocks, sink + behind + Bq, D]`."""
        build, (groups, size) = self._build, sizes
        parts = [new]
        if band.behind:
            parts.insert(0, build.op("Gather", past, self._window_index(band), axis=2))
        near = build.concat(*parts, axis=2)
        if band.blocks == 1:
            near = build.reshape(near, groups, 1, band.behind + band.block, size)
        else:
            steps = band.behind // band.block
            near = build.reshape(near, groups, steps + band.blocks, band.block, size)
            shifted = (build.slice(near, 1, t, t + band.blocks) for t in range(steps + 1))
            near = build.concat(*shifted, axis=2)
        if not band.sink:
            return near
        lead = min(band.sink, self._call.rows)
        first = build.concat(
            build.slice(past, 2, 0, band.sink), build.slice(new, 2, 0, lead), axis=2
        )
        sinks = build.op("Gather", first, self._sink_index(band, lead), axis=2)
        sinks = build.reshape(sinks, groups, 1, band.sink, size)
        return build.concat(build.expand(sinks, groups, band.blocks, band.sink, size), near, axis=2)

    def _window_index(self, band: _Band) -> ir.Value:
        """Cache slots `start - behind .. start - 1`, those before the first slot held at 0."""
        if ("window", band) not in self._made:
            offsets = self._build.int32(np.arange(-band.behind, 0))
            slots = self._build.op("Add", self._start, offsets)
            self._made["window", band] = self._build.op("Max", slots, self._build.int32([0]))
        return self._made["window", band]

    def _sink_index(self, band: _Band, lead: int) -> ir.Value:
        """Where sink `j` lies in `[cache sinks, first new rows]`: `j`, or `sink + j - start`."""
        if ("sink", band) not in self._made:
            build, position = self._build, self._build.int32(np.arange(band.sink))
            after = build.int32(np.arange(band.sink) + band.sink)
            new = build.op("Sub", after, self._start)
            new = build.op("Min", new, build.int32([band.sink + lead - 1]))
            cached = build.op("Less", position, self._start)
            self._made["sink", band] = build.op("Where", cached, position, new)
        return self._made["sink", band]

    def _banded_mask(self, band: _Band) -> ir.Value:
        """`[blocks, 1, Bq, keys]`. Slot `c` of block `b` holds position `c` if it is a sink slot,
        else `start + b*Bq - behind + (c - sink)`, which counts only from position `sink` on.
        """
        if ("banded", band) in self._made:
            return self._made["banded", band]
        build, slot = self._build, np.arange(band.keys)
        is_sink = slot < band.sink
        offset = slot - band.sink - band.behind  # relative to the block's first row
        first = np.arange(band.blocks).reshape(-1, 1, 1, 1) * band.block
        local = np.arange(band.block).reshape(-1, 1)
        in_band = is_sink | ((offset <= local) & (local - offset < band.window))
        position = build.op(
            "Add",
            build.op("Mul", self._start, build.int32(~is_sink)),
            build.int32(np.where(is_sink, slot, first + offset)),
        )  # [blocks, 1, 1, keys]
        row = build.op("Add", self._start, build.int32(first + local))  # [blocks, 1, Bq, 1]
        real = build.op("GreaterOrEqual", position, build.int32(np.where(is_sink, 0, band.sink)))
        causal = build.op("LessOrEqual", position, row)
        kept = build.op("And", build.op("And", real, causal), build.constant("in_band", in_band))
        self._made["banded", band] = kept
        return kept

    def _dense_mask(self, first: int) -> ir.Value:
        """`[Bq, M + seen]`: cache slots before `start`, and new keys up to the row itself."""
        if ("dense", first) in self._made:
            return self._made["dense", first]
        build, slots, block = self._build, self._call.slots, self._call.dense_block
        seen = first + block
        held = np.concatenate([np.arange(slots), np.full(seen, -1)])  # -1 < start: always
        new = np.concatenate([np.full(slots, -1), np.arange(seen)])
        row = build.int32(np.arange(first, seen).reshape(-1, 1))
        kept = build.op(
            "And",
            build.op("Less", build.int32(held), self._start),
            build.op("LessOrEqual", build.int32(new), row),
        )
        self._made["dense", first] = kept
        return kept
