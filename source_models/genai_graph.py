"""The decoder graph that onnxruntime-genai's builder writes, its weights from wherever.

GroupQueryAttention with the rotation inside and (unless queries and keys are normed) packed
projections; a cache that may be shared; no position_ids; right padding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array

_MICROSOFT: Final = "com.microsoft"
_OPSET: Final = 21
_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama, Qwen2 or Qwen3 model; `dtype` is that of weights, cache and logits."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_theta: float
    dtype: ir.DataType
    last_token_only: bool = False

    def cache(self, name: str, length: str) -> ir.Value:
        """`[B, G, length, D]`."""
        return self.value(name, "batch_size", self.kv_heads, length, self.head_size)

    def value(self, name: str, *shape: str | int) -> ir.Value:
        return _tensor(name, self.dtype, *shape)


class Weights(Protocol):
    """A checkpoint by Hugging Face's names; the same tensor name stands for the same tensor."""

    def __contains__(self, name: str) -> bool: ...

    def stored(self, name: str) -> ir.TensorProtocol:
        """A tensor as the checkpoint holds it."""

    def joined(self, name: str, parts: Sequence[str]) -> ir.TensorProtocol:
        """Matrices `[inputs, outputs]`, or vectors, side by side; `name` is a wish."""

    def table(self, name: str, array: Array) -> ir.TensorProtocol:
        """Numbers that are no weights, in the weights' type."""


def build_decoder(decoder: Decoder, weights: Weights) -> ir.Model:
    """Inputs `input_ids [B, S]`, `attention_mask [B, T]` (int64), past_key_values.N.{key,value}.

    Outputs `logits [B, S, V]`, or `[B, 1, V]` of the last token, and present.N.{key,value}.
    """
    ids = _tensor("input_ids", _INT64, "batch_size", "sequence_length")
    mask = _tensor("attention_mask", _INT64, "batch_size", "total_sequence_length")
    cache = [
        decoder.cache(f"past_key_values.{layer}.{part}", "past_sequence_length")
        for layer in range(decoder.layers)
        for part in ("key", "value")
    ]
    g = _Graph(decoder, weights)
    outputs = _model(g, ids, mask, cache)
    graph = ir.Graph(
        [ids, mask, *cache],
        outputs,
        nodes=g.nodes,
        initializers=list(g.initializers.values()),
        opset_imports={"": _OPSET, _MICROSOFT: 1},
        name="main_graph",
    )
    return ir.Model(graph, ir_version=10, producer_name="genai_graph")


def _tensor(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


class _Graph:
    """Appends nodes and initializers; every method returns the value it made."""

    def __init__(self, decoder: Decoder, weights: Weights) -> None:
        self.decoder = decoder
        self.weights = weights
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def op(self, name: str, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.many(name, op_type, inputs, 1, attributes)[0]

    def many(
        self, name: str, op_type: str, inputs: Any, outputs: int, attributes: dict[str, Any]
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

    def keep(self, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer of a tensor; one of a name is enough."""
        name = tensor.name
        assert name is not None
        if name not in self.initializers:
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            self.initializers[name] = ir.Value(
                name=name, const_value=tensor, shape=shape, type=kind
            )
        return self.initializers[name]

    def integers(self, name: str, *numbers: int) -> ir.Value:
        """`[n]` int64."""
        return self.keep(ir.tensor(np.array(numbers, np.int64), name=f"/c/{name}"))

    def linear(self, name: str, x: ir.Value, *parts: str) -> ir.Value:
        """MatMul by the parts' weights side by side, with their biases added if they have any."""
        matrices = [f"{part}.weight" for part in parts]
        weight = self.keep(self.weights.joined(f"model.{name}.MatMul.weight", matrices))
        x = self.op(name, "MatMul", x, weight)
        biases = [f"{part}.bias" for part in parts if f"{part}.bias" in self.weights]
        if not biases:
            return x
        bias = self.keep(self.weights.joined(f"model.{name}.Add.bias", biases))
        return self.op(f"{name}/Add", "Add", x, bias)

    def norm(self, name: str, x: ir.Value, source: str) -> ir.Value:
        """RMS norm over the last axis."""
        scale = self.keep(self.weights.stored(f"{source}.weight"))
        epsilon = self.decoder.epsilon
        return self.op(
            name, "SimplifiedLayerNormalization", x, scale,
            axis=-1, epsilon=epsilon, stash_type=1,
        )  # fmt: skip

    def skip_norm(
        self, name: str, summands: tuple[ir.Value, ir.Value], source: str
    ) -> tuple[ir.Value, ir.Value]:
        """Normed sum, and the sum itself."""
        inputs = [*summands, self.keep(self.weights.stored(f"{source}.weight"))]
        attributes = {"epsilon": self.decoder.epsilon}
        outputs = self.many(name, "SkipSimplifiedLayerNormalization", inputs, 4, attributes)
        for unused in outputs[1:3]:
            unused.name = ""
        return outputs[0], outputs[3]


def _model(g: _Graph, ids: ir.Value, mask: ir.Value, cache: list[ir.Value]) -> list[ir.Value]:
    """`[logits, present.0.key, present.0.value, ...]`."""
    decoder = g.decoder
    shared = (*_lengths(g, mask), *_rotation(g))
    table = g.keep(g.weights.stored("model.embed_tokens.weight"))
    hidden = g.op("embed_tokens", "Gather", table, ids)
    normed = g.norm("layers.0/input_layernorm", hidden, "model.layers.0.input_layernorm")
    outputs: list[ir.Value] = []
    for layer in range(decoder.layers):
        state = (cache[2 * layer], cache[2 * layer + 1], *shared)
        attended, *present = _attention(g, layer, normed, state)
        for value, part in zip(present, ("key", "value"), strict=True):
            named = decoder.cache(f"present.{layer}.{part}", "total_sequence_length")
            value.name, value.shape, value.type = named.name, named.shape, named.type
        outputs += present
        source = f"model.layers.{layer}.post_attention_layernorm"
        name = f"layers.{layer}/post_attention_layernorm"
        normed, hidden = g.skip_norm(name, (hidden, attended), source)
        final = layer + 1 == decoder.layers
        source = "model.norm" if final else f"model.layers.{layer + 1}.input_layernorm"
        name = f"layers.{layer + 1}/{'final_norm' if final else 'input'}_layernorm"
        normed, hidden = g.skip_norm(name, (hidden, _mlp(g, layer, normed)), source)
    return [_logits(g, normed), *outputs]


def _logits(g: _Graph, normed: ir.Value) -> ir.Value:
    decoder = g.decoder
    if decoder.last_token_only:
        normed = g.op("last_token", "Gather", normed, g.integers("last", -1), axis=1)
    logits = g.linear("lm_head", normed, "lm_head")
    length = 1 if decoder.last_token_only else "sequence_length"
    named = decoder.value("logits", "batch_size", length, decoder.vocabulary)
    logits.name, logits.shape, logits.type = named.name, named.shape, named.type
    return logits


def _lengths(g: _Graph, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k [B]` and `total_sequence_length []`, int32, from the mask `[B, T]`."""
    name = "attn_mask_reformat/attn_mask_subgraph"
    count = g.op(f"{name}/sum", "ReduceSum", mask, g.integers("axes", 1), keepdims=0)
    last = g.op(f"{name}/sub", "Sub", count, g.integers("one", 1))
    seqlens = g.op(f"{name}/seqlens_k", "Cast", last, to=int(_INT32))
    shape = g.op(f"{name}/shape", "Shape", mask)
    index = g.keep(ir.tensor(np.array(1, np.int64), name="/c/index"))
    total = g.op(f"{name}/gather", "Gather", shape, index, axis=0)
    return seqlens, g.op(f"{name}/total", "Cast", total, to=int(_INT32))


def _rotation(g: _Graph) -> tuple[ir.Value, ir.Value]:
    """cos and sin, `[positions, D/2]`."""
    decoder = g.decoder
    frequency = decoder.rope_theta ** (-np.arange(0, decoder.head_size, 2) / decoder.head_size)
    angle = np.arange(decoder.positions)[:, None] * frequency[None, :]
    cos = g.keep(g.weights.table("cos_cache", np.cos(angle)))
    return cos, g.keep(g.weights.table("sin_cache", np.sin(angle)))


def _attention(g: _Graph, layer: int, x: ir.Value, state: tuple[ir.Value, ...]) -> list[ir.Value]:
    """`[attended after o_proj, present key, present value]`."""
    decoder = g.decoder
    name, source = f"layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    rows: list[ir.Value | None]
    if f"{source}.q_norm.weight" in g.weights:
        q, k, v = (g.linear(f"{name}/{p}_proj", x, f"{source}.{p}_proj") for p in "qkv")
        q = _head_norm(g, f"{name}/q_norm", q, f"{source}.q_norm", decoder.heads)
        k = _head_norm(g, f"{name}/k_norm", k, f"{source}.k_norm", decoder.kv_heads)
        rows = [q, k, v]
    else:
        rows = [g.linear(f"{name}/qkv_proj", x, *(f"{source}.{p}_proj" for p in "qkv")), None, None]
    output, *present = g.many(
        name,
        "GroupQueryAttention",
        [*rows, *state],
        3,
        dict(
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            scale=float(decoder.head_size**-0.5),
            local_window_size=-1,
            do_rotary=1,
            rotary_interleaved=0,
        ),
    )
    return [g.linear(f"{name}/o_proj", output, f"{source}.o_proj"), *present]


def _head_norm(g: _Graph, name: str, x: ir.Value, source: str, heads: int) -> ir.Value:
    """RMS norm of each head of `[B, S, heads*D]`."""
    size = g.decoder.head_size
    split = g.op(f"{name}/reshape_1", "Reshape", x, g.integers(f"heads_{size}", 0, -1, size))
    normed = g.norm(name, split, source)
    merge = g.integers(f"merge_{heads}", 0, -1, heads * size)
    return g.op(f"{name}/reshape_2", "Reshape", normed, merge)


def _mlp(g: _Graph, layer: int, x: ir.Value) -> ir.Value:
    name, source = f"layers.{layer}/mlp", f"model.layers.{layer}.mlp"
    gate = g.linear(f"{name}/gate_proj", x, f"{source}.gate_proj")
    up = g.linear(f"{name}/up_proj", x, f"{source}.up_proj")
    active = g.op(f"{name}/act", "Mul", gate, g.op(f"{name}/act_fn", "Sigmoid", gate))
    product = g.op(f"{name}/mul", "Mul", active, up)
    return g.linear(f"{name}/down_proj", product, f"{source}.down_proj")
