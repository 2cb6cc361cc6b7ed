"""A hand-written decoder as an exported folder, so that the runtime's tests need no exporter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE as BLOCK_SPARSE
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.block_sparse.function_body import build_function as block_sparse_body
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, OP_TYPE, TrianglePattern
from trianglemix.custom_ops.triangle.function_body import build_function
from trianglemix.manifest.interface import GraphInput, GraphOutput
from trianglemix.manifest.manifest import LayerCache, Manifest

from source_models.tiny_tokenizer import VOCABULARY_SIZE, save_tokenizer

PATTERN: Final = TrianglePattern(num_sink_tokens=2, sliding_window_size=6, num_last_tokens=4)
HEADS, KV_HEADS, HEAD_SIZE, WIDTH = 4, 2, 8, 32
CONTEXT: Final = 512
LONG_CONTEXT: Final = 2048
RULE: Final = BlockRule(mass=0.4, min_length=0)


@dataclass(frozen=True)
class TinyFolder:
    """What to build: layer 0 is dense, the others are triangle layers."""

    layers: int = 3
    shared_cache: bool = True
    last_token_logits: bool = True
    prompt_length: bool = True
    position_ids: bool = True
    group_query_attention: bool = False  # the dense twin: GroupQueryAttention in every layer
    dtype: str = "float32"
    context_length: int | None = CONTEXT
    eos: int | None = None
    seed: int = 0
    block_sparse: bool = False  # layer 0 chooses blocks, and the context is longer

    @property
    def context(self) -> int | None:
        """The manifest's context length."""
        return LONG_CONTEXT if self.block_sparse else self.context_length


class _Graph:
    """Collects nodes and initializers of the decoder."""

    def __init__(self, spec: TinyFolder) -> None:
        self.spec = spec
        self.dtype = np.dtype(spec.dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(spec.seed)

    def op(self, op_type: str, inputs: list[str], *outputs: str, **attributes: object) -> str:
        outputs = outputs or (f"{op_type}_{len(self.nodes)}",)
        domain = str(attributes.pop("domain", ""))
        self.nodes.append(
            helper.make_node(op_type, inputs, list(outputs), domain=domain, **attributes)
        )
        return outputs[0]

    def const(self, array: np.ndarray) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        values = self._random.standard_normal(shape) * gain / np.sqrt(shape[0])
        return self.const(values.astype(self.dtype))


def build_folder(path: Path, spec: TinyFolder | None = None) -> Path:
    """Writes model, manifest, tokenizer and generation settings into `path`; returns `path`."""
    spec = spec or TinyFolder()
    path.mkdir(parents=True, exist_ok=True)
    onnx.save(_model(spec), path / "model.onnx")
    _manifest(spec).save(path)
    save_tokenizer(path)
    settings = {} if spec.eos is None else {"eos_token_id": spec.eos}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def _model(spec: TinyFolder) -> onnx.ModelProto:
    g = _Graph(spec)
    lengths = _lengths(g)
    hidden = g.op("Gather", [g.weight(VOCABULARY_SIZE, WIDTH, gain=16.0), "input_ids"])
    if spec.position_ids:
        place = g.op(
            "Gather", [g.weight(spec.context or CONTEXT, WIDTH, gain=16.0), "position_ids"]
        )
        hidden = g.op("Add", [hidden, place])
    for layer in range(spec.layers):
        hidden = _layer(g, layer, hidden, lengths)
    if spec.last_token_logits:
        end = g.ints(np.iinfo(np.int64).max)
        hidden = g.op("Slice", [hidden, g.ints(-1), end, g.ints(1)])
    g.op("MatMul", [hidden, g.weight(WIDTH, VOCABULARY_SIZE, gain=3.0)], "logits")
    if spec.prompt_length:  # an optional input: its default says "where the row's keys end"
        g.initializers.append(numpy_helper.from_array(np.zeros(1, np.int32), "prompt_length"))
    graph = helper.make_graph(g.nodes, "tiny", *_boundary(spec), initializer=g.initializers)
    opsets = [helper.make_opsetid("", contract.FUNCTION_OPSET)]
    if spec.group_query_attention:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)
    opsets.append(helper.make_opsetid(contract.DOMAIN, contract.OP_VERSION))
    bodies = [build_function()]
    if spec.block_sparse:
        bodies.append(block_sparse_body())
        del bodies[1].outputs[len(contract.OUTPUTS) :]
    functions = [ir.serde.serialize_function(body) for body in bodies]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def _lengths(g: _Graph) -> dict[str, str]:
    """`seqlens_k`, `total_sequence_length`, `prompt_length` and `first_valid` from the mask.

    A row's keys end with the mask, whatever its pads; a row of pads alone has its first key after.
    """
    zero, one = g.const(np.array(0, np.int32)), g.const(np.array(1, np.int32))
    mask = g.op("Cast", ["attention_mask"], to=TensorProto.BOOL)
    total = g.op("Cast", [g.op("Shape", ["attention_mask"], start=1, end=2)], to=TensorProto.INT32)
    index = g.op("Range", [zero, g.op("Squeeze", [total]), one])
    first = g.op("Where", [mask, index, total])
    after = g.op("Where", [mask, g.op("Add", [index, one]), zero])
    first, end = (
        g.op(kind, [value], axes=[1], keepdims=0)
        for kind, value in (("ReduceMin", first), ("ReduceMax", after))
    )
    names = {"total": total, "first": first, "prompt": end}
    names["seqlens"] = g.op("Sub", [g.op("Max", [total, end]), one])  # Max: one per row
    if g.spec.prompt_length:
        given = g.op("Greater", ["prompt_length", zero])
        names["prompt"] = g.op("Where", [given, "prompt_length", end])
    return names


def _layer(g: _Graph, layer: int, hidden: str, lengths: dict[str, str]) -> str:
    """One attention with a residual: enough of a decoder for its cache to matter."""
    query, key, value = (
        g.op("MatMul", [hidden, g.weight(WIDTH, heads * HEAD_SIZE)])
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    outputs = [f"attention_{layer}", f"present.{layer}.key", f"present.{layer}.value"]
    heads = {contract.ATTR_NUM_HEADS: HEADS, contract.ATTR_KV_NUM_HEADS: KV_HEADS}
    if g.spec.group_query_attention:
        inputs = [query, key, value, *past, lengths["seqlens"], lengths["total"]]
        g.op("GroupQueryAttention", inputs, *outputs, domain="com.microsoft", **heads)
    else:
        sparse = g.spec.block_sparse and not layer
        rule = RULE if sparse else PATTERN if layer else DENSE_PATTERN
        inputs = [query, key, value, *past]
        inputs += [lengths[name] for name in ("seqlens", "total", "prompt", "first")]
        attributes = {**heads, **rule.as_attributes(), "scale": 0.0, "softcap": 0.0}
        g.op(
            BLOCK_SPARSE if sparse else OP_TYPE,
            inputs,
            *outputs,
            domain=contract.DOMAIN,
            **attributes,
        )
    projected = g.op("MatMul", [outputs[0], g.weight(HEADS * HEAD_SIZE, WIDTH, gain=2.0)])
    return g.op("Tanh", [g.op("Add", [hidden, projected])])


def _boundary(spec: TinyFolder) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    info, int64 = helper.make_tensor_value_info, TensorProto.INT64
    real = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    inputs = [info("input_ids", int64, ["B", "S"]), info("attention_mask", int64, ["B", "T"])]
    if spec.position_ids:
        inputs.append(info("position_ids", int64, ["B", "S"]))
    if spec.prompt_length:
        inputs.append(info("prompt_length", TensorProto.INT32, ["B_or_1"]))
    outputs = [info("logits", real, ["B", "L", VOCABULARY_SIZE])]
    for layer in range(spec.layers):
        for kind in ("key", "value"):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            inputs.append(info(past, real, ["B", KV_HEADS, "P", HEAD_SIZE]))
            outputs.append(info(present, real, ["B", KV_HEADS, "U", HEAD_SIZE]))
    return inputs, outputs


def _manifest(spec: TinyFolder) -> Manifest:
    triangle = () if spec.group_query_attention else tuple(range(1, spec.layers))
    return Manifest(
        target="cpu",
        model_file="model.onnx",
        cache_dtype=spec.dtype,
        input_ids="input_ids",
        attention_mask="attention_mask",
        position_ids="position_ids" if spec.position_ids else None,
        prompt_length="prompt_length" if spec.prompt_length else None,
        logits="logits",
        last_token_logits=spec.last_token_logits,
        num_layers=spec.layers,
        triangle_layers=triangle,
        pattern=PATTERN,
        cache=tuple(_layer_cache(layer) for layer in range(spec.layers)),
        shared_cache=spec.shared_cache,
        left_padding=not spec.group_query_attention,
        context_length=spec.context,
        block_sparse_layers=(0,) if spec.block_sparse else (),
        block_rule=RULE if spec.block_sparse else None,
        inputs=_inputs(spec),
        outputs=_outputs(spec),
    )


def _inputs(spec: TinyFolder) -> tuple[GraphInput, ...]:
    inputs = [
        GraphInput("input_ids", "input_ids", "int64", ("B", "S"), token_axis=1),
        GraphInput("attention_mask", "attention_mask", "int64", ("B", "T"), token_axis=1),
    ]
    if spec.position_ids:
        inputs.append(GraphInput("position_ids", "position_ids", "int64", ("B", "S"), token_axis=1))
    if spec.prompt_length:
        inputs.append(GraphInput("prompt_length", "prompt_length", "int32", ("B_or_1",)))
    for layer in range(spec.layers):
        for role in ("key", "value"):
            inputs.append(
                GraphInput(
                    f"past_key_values.{layer}.{role}",
                    "past_key" if role == "key" else "past_value",
                    spec.dtype,
                    ("B", KV_HEADS, "P", HEAD_SIZE),
                    layer=layer,
                    token_axis=2,
                    carried_from=f"present.{layer}.{role}",
                )
            )
    return tuple(inputs)


def _outputs(spec: TinyFolder) -> tuple[GraphOutput, ...]:
    presents = tuple(
        GraphOutput(
            f"present.{layer}.{role}",
            "present_key" if role == "key" else "present_value",
            spec.dtype,
            ("B", KV_HEADS, "U", HEAD_SIZE),
            layer=layer,
        )
        for layer in range(spec.layers)
        for role in ("key", "value")
    )
    logits = GraphOutput("logits", "logits", spec.dtype, ("B", "L", VOCABULARY_SIZE))
    return (logits, *presents)


def _layer_cache(layer: int) -> LayerCache:
    past, present = f"past_key_values.{layer}", f"present.{layer}"
    return LayerCache(
        layer=layer,
        past_key=f"{past}.key",
        past_value=f"{past}.value",
        present_key=f"{present}.key",
        present_value=f"{present}.value",
        kv_num_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        value_head_size=HEAD_SIZE,
    )
