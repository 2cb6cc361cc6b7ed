"""Predicts, for one chip, what a prompt costs in the static graphs, by block size.

Time of an operator = the larger of its matrix work at the chip's matrix rate and its bytes at the
memory rate. Every operator of the block form reads and writes memory: fusion by the compiler, the
L2 cache, launch overheads, and rates below the derived peaks are left out (docs/ascend.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import kept_pairs
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.targets.ascend.soc import Soc

BLOCK_SIZES: Final = (16, 32, 64, 128, 256, 512)
_REAL_BYTES: Final = 4
_MASK_BYTES: Final = 1
_DENSE_SCORE_BYTES: Final = 1 << 28
"""Scores that a dense layer's row block may hold at once, over all heads."""


@dataclass(frozen=True)
class LayerWork:
    """Matrix flops, kept pairs' share of them, and bytes of one layer's attention in a prompt."""

    flops: float
    kept_flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class PromptCost:
    """A whole prompt on one chip with one block size; seconds are predictions, not measurements."""

    banded: LayerWork | None  # one triangle layer
    dense: LayerWork  # one dense layer
    attention_seconds: float
    dense_attention_seconds: float  # of the model with every layer dense
    other_seconds: float  # everything but attention

    @property
    def attention_share(self) -> float:
        """Attention's part of the prompt's time."""
        return self.attention_seconds / (self.attention_seconds + self.other_seconds)

    @property
    def prefill_share(self) -> float:
        """The prompt's time as a part of the all-dense model's."""
        dense = self.dense_attention_seconds + self.other_seconds
        return (self.attention_seconds + self.other_seconds) / dense


@dataclass(frozen=True)
class CostModel:
    """What is known of the model: attentions, bytes of a number, and its weights (elements)."""

    layers: Sequence[Attention]
    itemsize: int
    weight_elements: int
    slots: int
    chunk: int

    def banded(self, attention: Attention, block: int, rows: int, soc: Soc) -> LayerWork:
        """`rows` stream rows in blocks of `block`: keys are gathered, scores go through memory."""
        shape, pattern = attention.shape, attention.pattern
        sizes = shape.head_size + shape.value_head_size
        blocks = -(-rows // block)
        keys = pattern.num_sink_tokens + behind(pattern, block, self.chunk) + block
        pairs = blocks * block * keys
        flops = 2.0 * pairs * shape.num_heads * sizes
        # Window slices joined, sinks joined: each written and read once, then read by the product.
        gathered = 5.0 * blocks * keys * shape.kv_num_heads * sizes * self.itemsize
        kept = 2.0 * _streaming_pairs(rows, pattern) * shape.num_heads * sizes
        return self._work(flops, kept, gathered, pairs * shape.num_heads, soc)

    def dense(self, attention: Attention, rows: int, past: int, soc: Soc) -> LayerWork:
        """`rows` rows that see the whole cache (its free slots too: the graph is static)."""
        shape = attention.shape
        sizes = shape.head_size + shape.value_head_size
        pairs = rows * (self.slots + min(self.chunk, rows) / 2)
        flops = 2.0 * pairs * shape.num_heads * sizes
        kept = 2.0 * rows * (past + rows / 2) * shape.num_heads * sizes
        calls = -(-rows // self.chunk)
        cache = 3.0 * calls * self.slots * shape.kv_num_heads * sizes * self.itemsize
        joined = 2.0 * pairs * shape.num_heads * self.itemsize  # two products' scores side by side
        return self._work(flops, kept, cache + joined, pairs * shape.num_heads, soc)

    def prompt(self, length: int, block: int, soc: Soc) -> PromptCost:
        """A prompt of `length` tokens: stream rows, then the dense tail."""
        tail = min(length, max(a.pattern.num_last_tokens for a in self.layers))
        stream = length - tail
        attention = dense_attention = 0.0
        banded: LayerWork | None = None
        dense = self.dense(self.layers[0], length, 0, soc)
        for layer in self.layers:
            whole = self.dense(layer, length, 0, soc)
            dense_attention += whole.seconds
            if layer.pattern.is_dense:
                attention += whole.seconds
                continue
            banded = self.banded(layer, block, stream, soc)
            attention += banded.seconds + self.dense(layer, tail, stream, soc).seconds
        other = self._other_seconds(length, soc)
        return PromptCost(banded, dense, attention, dense_attention, other)

    def _work(self, flops: float, kept: float, moved: float, scores: float, soc: Soc) -> LayerWork:
        """Two products over `moved` bytes, and what softmax does to every score in memory."""
        per_score = 2 * self.itemsize  # the first product writes them, the second reads weights
        per_score += 4 * _REAL_BYTES + _MASK_BYTES  # Where and Softmax, in float32
        if self.itemsize != _REAL_BYTES:
            per_score += 2 * (self.itemsize + _REAL_BYTES)  # a cast on the way in, one out
        touched = moved + scores * per_score
        products = flops / _rate(soc, self.itemsize)
        return LayerWork(flops, kept, touched, products + touched / soc.memory_bytes_per_s)

    def _other_seconds(self, length: int, soc: Soc) -> float:
        calls = -(-length // self.chunk)
        flops = 2.0 * self.weight_elements * length
        moved = float(calls) * self.weight_elements * self.itemsize
        return max(flops / _rate(soc, self.itemsize), moved / soc.memory_bytes_per_s)


def behind(pattern: TrianglePattern, block: int, chunk: int) -> int:
    """Window keys before a block: whole blocks, but for a chunk of one block."""
    reach = pattern.sliding_window_size - 1
    return reach if block == chunk else -(-reach // block) * block


def choose_block(model: CostModel, length: int, soc: Soc) -> int:
    """The block size of the least predicted time among those that divide the chunk."""
    fitting = [block for block in BLOCK_SIZES if model.chunk % block == 0] or [model.chunk]
    return min(fitting, key=lambda block: model.prompt(length, block, soc).attention_seconds)


def choose_dense_block(model: CostModel) -> int:
    """The largest row block whose scores stay within 256 MiB, for any chip."""
    heads = max(layer.shape.num_heads for layer in model.layers)
    fitting = [
        block
        for block in (*BLOCK_SIZES, model.chunk)
        if model.chunk % block == 0
        and heads * block * (model.slots + model.chunk) * _REAL_BYTES <= _DENSE_SCORE_BYTES
    ]
    smallest = next((b for b in BLOCK_SIZES if model.chunk % b == 0), model.chunk)
    return max(fitting, default=smallest)


@dataclass(frozen=True)
class TileFit:
    """Bytes of the unified buffer that a fused tile needs, and whether all a chip's hold it."""

    ub_bytes: int
    fits: bool


def tile_fit(attention: Attention, tile: tuple[int, int], itemsize: int, soc: Soc) -> TileFit:
    """A fused kernel's tile: scores, weights and two float32 row accumulators in the unified
    buffer; the queries and two tiles each of keys and values in L1.
    """
    (rows, keys), shape = tile, attention.shape
    ub = rows * keys * (_REAL_BYTES + itemsize) + 2 * rows * shape.value_head_size * _REAL_BYTES
    sizes = shape.head_size + shape.value_head_size
    l1 = (rows * shape.head_size + 2 * keys * sizes) * itemsize
    l0c = rows * max(keys, shape.value_head_size) * _REAL_BYTES
    l0 = max(rows, keys) * max(shape.head_size, shape.value_head_size) * itemsize
    fits = ub <= soc.ub_bytes and l1 <= soc.l1_bytes and l0c <= soc.l0c_bytes
    return TileFit(ub, fits and l0 <= soc.l0_bytes)


def _streaming_pairs(rows: int, pattern: TrianglePattern) -> int:
    """Kept pairs of the first `rows` rows, none of which is a last row."""
    last = pattern.num_last_tokens
    whole = kept_pairs(rows + last, pattern)
    return whole - sum(range(rows + 1, rows + last + 1))


def _rate(soc: Soc, itemsize: int) -> float:
    """Matrix flops per second; float32 products are taken as four of float16."""
    return soc.half_flops if itemsize == 2 else soc.half_flops / 4
