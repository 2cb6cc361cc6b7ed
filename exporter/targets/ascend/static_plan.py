"""Sizes and names of the static graphs that an Ascend folder consists of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets.ascend.block_form import StaticCall
from trianglemix.manifest.static_graphs import Lowering

INPUT_IDS: Final = "input_ids"
START: Final = "start"
LENGTH: Final = "length"
LOGITS: Final = "logits"
_TAIL_BLOCK: Final = 128


class GraphKind(Enum):
    """STREAM: prompt rows before the dense tail. TAIL: the last rows. DECODE: one row."""

    STREAM = "stream"
    TAIL = "tail"
    DECODE = "decode"


@dataclass(frozen=True)
class StaticPlan:
    """Tokens: `slots` of the cache, `chunk` rows of a stream call, `last` rows of a tail call.

    Raises:
        ExportError: sizes that do not fit each other; the message says which.
    """

    slots: int
    chunk: int
    last: int
    banded_block: int
    dense_block: int
    lowering: Lowering = "block"

    def __post_init__(self) -> None:
        for name in ("chunk", "last"):
            size = getattr(self, name)
            if not 1 <= size <= self.slots:
                raise ExportError(
                    f"{name} is {size}, but must be 1 to {self.slots}, the tokens of the cache; "
                    "change --chunk or --max-length"
                )
        for name in ("banded_block", "dense_block"):
            block = getattr(self, name)
            if block < 1 or self.chunk % block:
                raise ExportError(
                    f"a block of {block} rows does not divide the chunk of {self.chunk}; change "
                    "--block or --chunk"
                )

    @property
    def cache_slots(self) -> int:
        """Slots of the cache inputs: the custom operator appends pads behind the last real row."""
        spare = max(self.chunk, self.last) if self.lowering == "custom" else 0
        return self.slots + spare

    def call(self, kind: GraphKind) -> StaticCall:
        """Rows and blocks of one graph; its slots are `cache_slots`."""
        if kind is GraphKind.STREAM:
            return StaticCall(self.chunk, self.cache_slots, self.banded_block, self.dense_block)
        rows = self.last if kind is GraphKind.TAIL else 1
        block = next(size for size in range(min(rows, _TAIL_BLOCK), 0, -1) if rows % size == 0)
        return StaticCall(rows, self.cache_slots, rows, block)

    def file_name(self, kind: GraphKind) -> str:
        """`stream_1024.onnx`, `tail.onnx`, `decode.onnx`."""
        suffix = f"_{self.chunk}" if kind is GraphKind.STREAM else ""
        return f"{kind.value}{suffix}.onnx"


def cache_names(layer: int) -> tuple[str, str]:
    """Inputs: keys and values of the cache."""
    return f"cache.{layer}.key", f"cache.{layer}.value"


def new_names(layer: int) -> tuple[str, str]:
    """Outputs: keys and values of the new rows, to be stored in the cache."""
    return f"new.{layer}.key", f"new.{layer}.value"
