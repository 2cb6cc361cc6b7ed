"""Tiny models with `com.microsoft::GroupQueryAttention`, in the style of genai's model builder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_MICROSOFT: Final = "com.microsoft"
_OPSET: Final = 21
_INT32, _INT64, _FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
Array = NDArray[Any]


@dataclass(frozen=True)
class _Sizes:
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    rope_theta: float
    positions: int


class _Graph:
    """Appends nodes and initializers; every method returns the value it made."""

    def __init__(self, weights: dict[str, Array]) -> None:
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

    def constant(self, name: str, array: Array) -> ir.Value:
        if name not in self.initializers:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            self.initializers[name] = ir.Value(
                name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
            )
        return self.initializers[name]

    def linear(self, name: str, x: ir.Value, *parts: str) -> ir.Value:
        """MatMul by the parts' weights side by side, with their biases added if they have any."""
        weight = np.concatenate([self.weights[f"{part}.weight"].T for part in parts], axis=1)
        x = self.op(name, "MatMul", x, self.constant(f"model.{name}.MatMul.weight", weight))
        biases = [self.weights.get(f"{part}.bias") for part in parts]
        present = [bias for bias in biases if bias is not None]
        if not present:
            return x
        bias = self.constant(f"model.{name}.Add.bias", np.concatenate(present))
        return self.op(f"{name}/Add", "Add", x, bias)


def build_gqa(folder: Path, path: Path) -> None:
    """Writes the Llama, Qwen2 or Qwen3 model of a Hugging Face folder as a genai-style graph.

    Inputs input_ids `[B, S]`, attention_mask `[B, T]`, past_key_values.N.{key,value}
    `[B, G, P, D]`; no position_ids: RoPE is inside GroupQueryAttention. Right padding only.
    """
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = _sizes(config)
    graph = _Graph(load_file(folder / "model.safetensors"))
    inputs = [_tensor("input_ids", _INT64, "batch_size", "sequence_length")]
    inputs.append(_tensor("attention_mask", _INT64, "batch_size", "total_sequence_length"))
    cache = [
        _cache_value(f"past_key_values.{layer}.{part}", "past_sequence_length", sizes)
        for layer in range(sizes.layers)
        for part in ("key", "value")
    ]
    outputs = _model(graph, sizes, [*inputs, *cache])
    model = ir.Model(
        ir.Graph(
            [*inputs, *cache],
            outputs,
            nodes=graph.nodes,
            initializers=list(graph.initializers.values()),
            opset_imports={"": _OPSET, _MICROSOFT: 1},
            name="main_graph",
        ),
        ir_version=10,
        producer_name="tiny_gqa",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data")


def _sizes(config: dict[str, Any]) -> _Sizes:
    rope = config.get("rope_parameters") or config  # transformers 5 and 4 write it differently
    heads = config["num_attention_heads"]
    return _Sizes(
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        epsilon=config["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        positions=config["max_position_embeddings"],
    )


def _tensor(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _cache_value(name: str, length: str, sizes: _Sizes) -> ir.Value:
    return _tensor(name, _FLOAT, "batch_size", sizes.kv_heads, length, sizes.head_size)


def _model(g: _Graph, sizes: _Sizes, inputs: list[ir.Value]) -> list[ir.Value]:
    """`[logits, present.0.key, present.0.value, ...]`."""
    input_ids, attention_mask, *cache = inputs
    lengths = _lengths(g, attention_mask)
    table = g.constant("model.embed_tokens.weight", g.weights["model.embed_tokens.weight"])
    hidden = g.op("embed_tokens", "Gather", table, input_ids)
    scale = g.constant("model.layers.0.input_layernorm.weight", _norm(g, 0, "input_layernorm"))
    normed = g.op(
        "layers.0/input_layernorm",
        "SimplifiedLayerNormalization",
        hidden,
        scale,
        axis=-1,
        epsilon=sizes.epsilon,
        stash_type=1,
    )
    outputs: list[ir.Value] = []
    for layer in range(sizes.layers):
        pasts = cache[2 * layer], cache[2 * layer + 1]
        attended, *present = _attention(g, sizes, layer, normed, (*pasts, *lengths))
        for value, part in zip(present, ("key", "value"), strict=True):
            value.name = f"present.{layer}.{part}"
            value.type = ir.TensorType(_FLOAT)
            value.shape = ir.Shape(
                ("batch_size", sizes.kv_heads, "total_sequence_length", sizes.head_size)
            )
        outputs += present
        normed, hidden = _skip_norm(
            g, sizes, f"layers.{layer}/post_attention_layernorm", (hidden, attended)
        )
        mlp = _mlp(g, layer, normed)
        following = f"layers.{layer + 1}/input_layernorm"
        name = following if layer + 1 < sizes.layers else f"layers.{layer + 1}/final_norm_layernorm"
        normed, hidden = _skip_norm(g, sizes, name, (hidden, mlp))
    logits = g.linear("lm_head", normed, "lm_head")
    logits.name = "logits"
    logits.type = ir.TensorType(_FLOAT)
    vocabulary = g.weights["lm_head.weight"].shape[0]
    logits.shape = ir.Shape(("batch_size", "sequence_length", vocabulary))
    return [logits, *outputs]


def _lengths(g: _Graph, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k [B]` and `total_sequence_length []`, int32, from the mask `[B, T]`."""
    name = "attn_mask_reformat/attn_mask_subgraph"
    one = np.array([1], np.int64)
    count = g.op(f"{name}/sum", "ReduceSum", attention_mask, g.constant("/c/axes", one), keepdims=0)
    last = g.op(f"{name}/sub", "Sub", count, g.constant("/c/one", one))
    seqlens = g.op(f"{name}/seqlens_k", "Cast", last, to=int(_INT32))
    shape = g.op(f"{name}/shape", "Shape", attention_mask)
    total = g.op(
        f"{name}/gather", "Gather", shape, g.constant("/c/index", np.array(1, np.int64)), axis=0
    )
    return seqlens, g.op(f"{name}/total", "Cast", total, to=int(_INT32))


def _norm(g: _Graph, layer: int, name: str) -> Array:
    return g.weights[f"model.layers.{layer}.{name}.weight"]


def _skip_norm(
    g: _Graph, sizes: _Sizes, name: str, summands: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    """Normed sum and the sum itself."""
    final = "final_norm" in name
    source = "model.norm" if final else "model." + name.replace("/", ".")
    scale = g.constant(f"{source}.weight.skip", g.weights[f"{source}.weight"])
    inputs = [*summands, scale]
    outputs = g.many(
        name, "SkipSimplifiedLayerNormalization", inputs, 4, {"epsilon": sizes.epsilon}
    )
    for unused in outputs[1:3]:
        unused.name = ""
    return outputs[0], outputs[3]


def _mlp(g: _Graph, layer: int, x: ir.Value) -> ir.Value:
    name, source = f"layers.{layer}/mlp", f"model.layers.{layer}.mlp"
    gate = g.linear(f"{name}/gate_proj", x, f"{source}.gate_proj")
    up = g.linear(f"{name}/up_proj", x, f"{source}.up_proj")
    active = g.op(f"{name}/act", "Mul", gate, g.op(f"{name}/act_fn", "Sigmoid", gate))
    return g.linear(
        f"{name}/down_proj", g.op(f"{name}/mul", "Mul", active, up), f"{source}.down_proj"
    )


def _attention(
    g: _Graph, sizes: _Sizes, layer: int, x: ir.Value, state: tuple[ir.Value, ...]
) -> list[ir.Value]:
    """`[attended after o_proj, present key, present value]`; packed QKV unless q/k are normed."""
    name, source = f"layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    projections = [f"{source}.{part}_proj" for part in "qkv"]
    rows: list[ir.Value | None]
    if f"{source}.q_norm.weight" in g.weights:
        q, k, v = (g.linear(f"{name}/{p.rsplit('.', 1)[1]}", x, p) for p in projections)
        heads = (sizes.heads, sizes.kv_heads)
        q, k = (
            _head_norm(g, sizes, f"{source}.{part}_norm", value, count)
            for part, value, count in zip("qk", (q, k), heads, strict=True)
        )
        rows = [q, k, v]
    else:
        rows = [g.linear(f"{name}/qkv_proj", x, *projections), None, None]
    cos, sin = _rotary_caches(g, sizes)
    output, *present = g.many(
        name,
        "GroupQueryAttention",
        [*rows, *state, cos, sin],
        3,
        dict(
            num_heads=sizes.heads,
            kv_num_heads=sizes.kv_heads,
            scale=float(sizes.head_size**-0.5),
            local_window_size=-1,
            do_rotary=1,
            rotary_interleaved=0,
        ),
    )
    return [g.linear(f"{name}/o_proj", output, f"{source}.o_proj"), *present]


def _head_norm(g: _Graph, sizes: _Sizes, source: str, x: ir.Value, heads: int) -> ir.Value:
    """RMS norm of each head of `[B, S, heads*D]`."""
    split = g.constant(f"/c/heads_{sizes.head_size}", np.array([0, -1, sizes.head_size], np.int64))
    merge = g.constant(f"/c/merge_{heads}", np.array([0, -1, heads * sizes.head_size], np.int64))
    name = source.removeprefix("model.").replace(".self_attn.", "/attn/")
    x = g.op(f"{name}/reshape_1", "Reshape", x, split)
    scale = g.constant(f"{source}.layernorm.weight", g.weights[f"{source}.weight"])
    x = g.op(
        name, "SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=sizes.epsilon, stash_type=1
    )
    return g.op(f"{name}/reshape_2", "Reshape", x, merge)


def _rotary_caches(g: _Graph, sizes: _Sizes) -> tuple[ir.Value, ir.Value]:
    """cos and sin, `[positions, D/2]`."""
    frequency = sizes.rope_theta ** (-np.arange(0, sizes.head_size, 2) / sizes.head_size)
    angle = np.arange(sizes.positions)[:, None] * frequency[None, :]
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return g.constant("cos_cache", cos), g.constant("sin_cache", sin)
