"""A Llama-shaped decoder with GroupQueryAttention and random float16 weights, for timing only.

The graph follows the form that onnxruntime-genai's builder writes: packed QKV, rotation inside the
attention node, a shared cache. Weights lie in one external file; `weight_sets` layers' worth of
them are written and the layers take turns, so that a small disk or a short lease is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

DATA_FILE: Final = "model.onnx.data"
_MICROSOFT: Final = "com.microsoft"
_HALF, _INT32, _INT64 = ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64
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
    tables: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)

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


class _Builder:
    def __init__(self, shape: LlamaShape) -> None:
        self.shape = shape
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.file = WeightFile()

    def weight(self, name: str, *size: int) -> ir.Value:
        """A float16 initializer at the next free place of the data file."""
        if name in self.initializers:
            return self.initializers[name]
        length = 2 * int(np.prod(size))
        tensor = ir.ExternalTensor(
            DATA_FILE, self.file.size, length, _HALF, shape=ir.Shape(size), name=name
        )
        self.file.size += -(-length // _ALIGN) * _ALIGN
        return self._keep(name, tensor)

    def table(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A float16 initializer in the data file whose values matter."""
        self.file.tables[self.file.size] = array
        return self.weight(name, *array.shape)

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return self.initializers.get(name) or self._keep(name, ir.tensor(array, name=name))

    def _keep(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=kind)
        self.initializers[name] = value
        return value

    def op(self, name: str, op_type: str, inputs: list[Any], **attributes: Any) -> ir.Value:
        return self.many(name, op_type, inputs, 1, attributes)[0]

    def many(
        self, name: str, op_type: str, inputs: list[Any], outputs: int, attributes: dict[str, Any]
    ) -> list[ir.Value]:
        contrib = op_type in ("GroupQueryAttention", "SkipSimplifiedLayerNormalization")
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or None,
            domain=_MICROSOFT if contrib else "",
            num_outputs=outputs,
            name=f"/model/{name}/{op_type}",
        )
        for index, value in enumerate(node.outputs):
            value.name = f"/model/{name}/output_{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def linear(self, name: str, x: ir.Value, rows: int, columns: int, layer: int) -> ir.Value:
        weights = layer % self.shape.weight_sets
        return self.op(
            f"layers.{layer}/{name}",
            "MatMul",
            [x, self.weight(f"layers.{weights}.{name}.weight", rows, columns)],
        )


def build_llama(shape: LlamaShape, folder: Path) -> WeightFile:
    """Writes `folder/model.onnx`; returns what its data file must hold, for the caller to write.

    Inputs `input_ids [B, S]`, `attention_mask [B, T]` (int64) and a cache `[B, G, P, D]` for each
    layer; outputs `logits [B, 1, V]` of the last token, and the cache.
    """
    b = _Builder(shape)
    ids = _tensor("input_ids", _INT64, "batch_size", "sequence_length")
    mask = _tensor("attention_mask", _INT64, "batch_size", "total_sequence_length")
    cache = [
        _cache(f"past_key_values.{layer}.{part}", "past_sequence_length", shape)
        for layer in range(shape.layers)
        for part in ("key", "value")
    ]
    outputs = _decoder(b, ids, mask, cache)
    graph = ir.Graph(
        [ids, mask, *cache],
        outputs,
        nodes=b.nodes,
        initializers=list(b.initializers.values()),
        opset_imports={"": 21, _MICROSOFT: 1},
        name="main_graph",
    )
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(ir.Model(graph, ir_version=10, producer_name="llama_graph"), folder / "model.onnx")
    return b.file


def _tensor(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _cache(name: str, length: str, shape: LlamaShape) -> ir.Value:
    return _tensor(name, _HALF, "batch_size", shape.kv_heads, length, shape.head_size)


def _lengths(b: _Builder, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k [B]` and `total_sequence_length []`, int32, from the mask `[B, T]`."""
    name, one = "attn_mask_reformat/attn_mask_subgraph", np.array([1], np.int64)
    count = b.op(f"{name}/sum", "ReduceSum", [mask, b.constant("/c/axes", one)], keepdims=0)
    last = b.op(f"{name}/sub", "Sub", [count, b.constant("/c/one", one)])
    seqlens = b.op(f"{name}/seqlens_k", "Cast", [last], to=int(_INT32))
    size = b.op(f"{name}/shape", "Shape", [mask])
    index = b.constant("/c/index", np.array(1, np.int64))
    total = b.op(f"{name}/gather", "Gather", [size, index], axis=0)
    return seqlens, b.op(f"{name}/total", "Cast", [total], to=int(_INT32))


def _rotation(b: _Builder) -> tuple[ir.Value, ir.Value]:
    size = b.shape.head_size
    frequency = 500000.0 ** (-np.arange(0, size, 2) / size)
    angle = np.arange(b.shape.positions)[:, None] * frequency[None, :]
    cos, sin = np.cos(angle).astype(np.float16), np.sin(angle).astype(np.float16)
    return b.table("cos_cache", cos), b.table("sin_cache", sin)


def _decoder(b: _Builder, ids: ir.Value, mask: ir.Value, cache: list[ir.Value]) -> list[ir.Value]:
    shape = b.shape
    lengths, rotation = _lengths(b, mask), _rotation(b)
    table = b.weight("embed_tokens.weight", shape.vocabulary, shape.hidden)
    hidden = b.op("embed_tokens", "Gather", [table, ids])
    ones = b.constant("norm.weight", np.ones(shape.hidden, np.float16))
    normed = b.op(
        "first_norm", "SimplifiedLayerNormalization", [hidden, ones],
        axis=-1, epsilon=1e-5, stash_type=1,
    )  # fmt: skip
    outputs: list[ir.Value] = []
    for layer in range(shape.layers):
        state = [cache[2 * layer], cache[2 * layer + 1], *lengths, *rotation]
        attended, *present = _attention(b, layer, normed, state)
        for value, part in zip(present, ("key", "value"), strict=True):
            named = _cache(f"present.{layer}.{part}", "total_sequence_length", shape)
            value.name, value.shape, value.type = named.name, named.shape, named.type
        outputs += present
        normed, hidden = _skip_norm(b, f"layers.{layer}/mlp_norm", hidden, attended, ones)
        normed, hidden = _skip_norm(
            b, f"layers.{layer}/next_norm", hidden, _mlp(b, layer, normed), ones
        )
    head = b.weight("lm_head.weight", shape.hidden, shape.vocabulary)
    last = b.op("last_token", "Gather", [normed, b.constant("/c/last", np.array([-1]))], axis=1)
    logits = b.op("lm_head", "MatMul", [last, head])
    logits.name, logits.type = "logits", ir.TensorType(_HALF)
    logits.shape = ir.Shape(("batch_size", 1, shape.vocabulary))
    return [logits, *outputs]


def _attention(b: _Builder, layer: int, x: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
    shape = b.shape
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    packed = b.linear("qkv_proj", x, shape.hidden, width, layer)
    output, *present = b.many(
        f"layers.{layer}/attn",
        "GroupQueryAttention",
        [packed, None, None, *state],
        3,
        dict(
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            scale=float(shape.head_size**-0.5),
            local_window_size=-1,
            do_rotary=1,
            rotary_interleaved=0,
        ),
    )
    columns = shape.heads * shape.head_size
    return [b.linear("o_proj", output, columns, shape.hidden, layer), *present]


def _skip_norm(
    b: _Builder, name: str, hidden: ir.Value, added: ir.Value, scale: ir.Value
) -> tuple[ir.Value, ir.Value]:
    inputs = [hidden, added, scale]
    outputs = b.many(name, "SkipSimplifiedLayerNormalization", inputs, 4, {"epsilon": 1e-5})
    for unused in outputs[1:3]:
        unused.name = ""
    return outputs[0], outputs[3]


def _mlp(b: _Builder, layer: int, x: ir.Value) -> ir.Value:
    hidden, inner = b.shape.hidden, b.shape.intermediate
    gate = b.linear("gate_proj", x, hidden, inner, layer)
    up = b.linear("up_proj", x, hidden, inner, layer)
    sigmoid = b.op(f"layers.{layer}/act_fn", "Sigmoid", [gate])
    active = b.op(f"layers.{layer}/act", "Mul", [gate, sigmoid])
    product = b.op(f"layers.{layer}/mul", "Mul", [active, up])
    return b.linear("down_proj", product, inner, hidden, layer)
