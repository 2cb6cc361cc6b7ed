"""A Llama-shaped decoder with GroupQueryAttention and random float16 weights, for timing only.

Weights lie in one external file; `weight_sets` layers' worth of them are written and the layers
take turns, so that a small disk or a short lease is enough.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from source_models.genai_graph import Array, Decoder, build_decoder

DATA_FILE: Final = "model.onnx.data"
_HALF: Final = ir.DataType.FLOAT16
_ALIGN: Final = 4096


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of Llama-3.1-8B by default."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    intermediate: int = 14336
    vocabulary: int = 128256
    positions: int = 131072 + 1024
    weight_sets: int = 32


@dataclass
class WeightFile:
    """What the data file must hold: random weights, and these tables at their offsets."""

    size: int = 0
    tables: dict[int, Array] = field(default_factory=dict)

    def write(self, path: Path, seed: int = 0) -> None:
        """Normal float16 weights of deviation 0.02, a block of 64 MiB again and again."""
        block = np.random.default_rng(seed).standard_normal(1 << 25, np.float32) * np.float32(0.02)
        data = block.astype(np.float16).tobytes()
        with path.open("wb") as file:
            for start in range(0, self.size, len(data)):
                file.write(data[: min(len(data), self.size - start)])
            for offset, table in self.tables.items():
                file.seek(offset)
                file.write(table.tobytes())


class _RandomWeights:
    """Places in the data file, `weight_sets` layers' worth of them; norms are 1."""

    def __init__(self, shape: LlamaShape) -> None:
        self._shape = shape
        self._placed: dict[str, ir.TensorProtocol] = {}
        self.file = WeightFile()

    def __contains__(self, name: str) -> bool:
        return not name.endswith((".bias", "q_norm.weight", "k_norm.weight"))

    def stored(self, name: str) -> ir.TensorProtocol:
        if "norm" in name:
            return ir.tensor(np.ones(self._shape.hidden, np.float16), name="norm.weight")
        return self._place(name, *self._size(name))

    def joined(self, name: str, parts: Sequence[str]) -> ir.TensorProtocol:
        sizes = [self._size(part) for part in parts]
        taken = re.sub(
            r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) % self._shape.weight_sets}", name
        )
        return self._place(taken, sizes[0][1], sum(rows for rows, _ in sizes))

    def table(self, name: str, array: Array) -> ir.TensorProtocol:
        self.file.tables[self.file.size] = array.astype(np.float16)
        return self._place(name, *array.shape)

    def _size(self, name: str) -> tuple[int, int]:
        """`(outputs, inputs)` of a matrix, by the last part of its name but `weight`."""
        shape = self._shape
        query, cache = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        hidden, inner = shape.hidden, shape.intermediate
        return {
            "q_proj": (query, hidden), "k_proj": (cache, hidden), "v_proj": (cache, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
            "embed_tokens": (shape.vocabulary, hidden), "lm_head": (shape.vocabulary, hidden),
        }[name.split(".")[-2]]  # fmt: skip

    def _place(self, name: str, *size: int) -> ir.TensorProtocol:
        """A float16 tensor at the next free place of the data file."""
        if name not in self._placed:
            length = 2 * int(np.prod(size))
            self._placed[name] = ir.ExternalTensor(
                DATA_FILE, self.file.size, length, _HALF, shape=ir.Shape(size), name=name
            )
            self.file.size += -(-length // _ALIGN) * _ALIGN
        return self._placed[name]


def build_llama(shape: LlamaShape, folder: Path) -> WeightFile:
    """Writes `folder/model.onnx`, whose logits are the last token's.

    Returns what its data file must hold, for the caller to write.
    """
    weights = _RandomWeights(shape)
    decoder = Decoder(
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        vocabulary=shape.vocabulary,
        positions=shape.positions,
        epsilon=1e-5,
        rope_theta=500000.0,
        dtype=_HALF,
        last_token_only=True,
    )
    model = build_decoder(decoder, weights)
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx")
    return weights.file
