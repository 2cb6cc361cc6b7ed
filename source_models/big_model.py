"""Makes an ONNX decoder with gigabytes of external weights in a second: its data file is sparse.

    python -m source_models.big_model build/big            # 32 layers, 5 GB
    python -m source_models.big_model build/big --shards 4 --gigabytes 12

The weights are zeros that take no disk. Attention is decomposed and small (4 heads of 16): what
an export costs depends on how many nodes and bytes there are, not on the size of a head.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.patterns._example import (
    SHAPE,
    ExampleLayer,
    decomposed_attention,
    graph_input,
)

_VOCABULARY: Final = 32000
_HIDDEN: Final = 4096
_ALIGNMENT: Final = 4096
_ITEM: Final = 4  # bytes of a float32


@dataclass
class _Weights:
    """Float32 zeros in sparse files `model.onnx.data`, `model.onnx.data1` and so on."""

    folder: Path
    shards: int
    ends: dict[str, int] = field(default_factory=dict)

    def add(self, graph: ir.Graph, name: str, *shape: int) -> ir.Value:
        shard = len(graph.initializers) % self.shards
        location = "model.onnx.data" + (str(shard) if shard else "")
        start = -(-self.ends.get(location, 0) // _ALIGNMENT) * _ALIGNMENT
        size = shape[0] * shape[1] * _ITEM
        self.ends[location] = start + size
        tensor = ir.ExternalTensor(
            location, start, size, ir.DataType.FLOAT,
            shape=ir.Shape(shape), name=name, base_dir=self.folder,
        )  # fmt: skip
        value = ir.val(name, const_value=tensor)
        graph.register_initializer(value)
        return value

    def write(self) -> int:
        """Makes the files; returns their size in bytes."""
        for location, end in self.ends.items():
            with (self.folder / location).open("wb") as file:
                file.truncate(end)
        return sum(self.ends.values())


def make_big_model(folder: Path, layers: int = 32, gigabytes: float = 5, shards: int = 1) -> int:
    """Writes `folder/model.onnx` and its data files; returns the bytes of external data."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = _Weights(folder, shards)
    inputs = [graph_input("input_ids", ir.DataType.INT64, "batch", "sequence"),
              graph_input("attention_mask", ir.DataType.INT64, "batch", "total")]  # fmt: skip
    pasts = [
        graph_input(f"past_key_values.{layer}.{part}", ir.DataType.FLOAT,
               "batch", SHAPE.kv_num_heads, "past", SHAPE.head_size)
        for layer in range(layers) for part in ("key", "value")
    ]  # fmt: skip
    graph = ir.Graph([*inputs, *pasts], [], nodes=[], opset_imports={"": 18}, name="big")
    build = GraphBuilder(graph, "big")
    embedding = weights.add(graph, "embedding", _VOCABULARY, _HIDDEN)
    hidden = build.op("Gather", embedding, inputs[0])
    inner = int(gigabytes * 1e9 / layers / _ITEM / _HIDDEN / 2)
    presents: list[ir.Value] = []
    for layer in range(layers):
        state = (inputs[1], *pasts[2 * layer : 2 * layer + 2])
        hidden, *present = _layer(build, weights, f"layers.{layer}", hidden, (state, inner))
        for value, past in zip(present, pasts[2 * layer :], strict=False):
            value.name = str(past.name).replace("past_key_values", "present")
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape(["batch", SHAPE.kv_num_heads, "total", SHAPE.head_size])
        presents += present
    logits = build.op("MatMul", hidden, weights.add(graph, "head", _HIDDEN, _VOCABULARY))
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "sequence", _VOCABULARY])
    graph.extend(build.nodes)
    graph.outputs.extend([logits, *presents])
    ir.save(ir.Model(graph, ir_version=8), folder / "model.onnx")
    return weights.write()


def _layer(
    build: GraphBuilder,
    weights: _Weights,
    name: str,
    hidden: ir.Value,
    given: tuple[tuple[ir.Value, ir.Value, ir.Value], int],
) -> list[ir.Value]:
    """Hidden states after the layer, present key, present value."""
    (mask, past_key, past_value), inner = given

    def linear(part: str, x: ir.Value, rows: int, columns: int) -> ir.Value:
        return build.op("MatMul", x, weights.add(build.graph, f"{name}.{part}", rows, columns))

    kv_width = SHAPE.kv_num_heads * SHAPE.head_size
    query, key, value = (
        linear(part, hidden, _HIDDEN, width)
        for part, width in zip("qkv", (SHAPE.num_heads * SHAPE.head_size, kv_width, kv_width),
                               strict=True)
    )  # fmt: skip
    attended, present_key, present_value = decomposed_attention(
        build, ExampleLayer(query, key, value, past_key, past_value, mask)
    )
    width = SHAPE.num_heads * SHAPE.value_head_size
    hidden = build.op("Add", hidden, linear("o", attended, width, _HIDDEN))
    active = build.op("Relu", linear("up", hidden, _HIDDEN, inner))
    hidden = build.op("Add", hidden, linear("down", active, inner, _HIDDEN))
    return [hidden, present_key, present_value]


def main() -> int:
    """Makes the model and says how large it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--shards", type=int, default=1, help="data files")
    arguments = parser.parse_args()
    size = make_big_model(arguments.folder, arguments.layers, arguments.gigabytes, arguments.shards)
    print(f"{arguments.folder / 'model.onnx'}: {size / 1e9:.2f} GB of external data")
    return 0


if __name__ == "__main__":
    sys.exit(main())
