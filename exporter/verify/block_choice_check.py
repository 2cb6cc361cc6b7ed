"""The blocks that block-sparse layers choose, and their output, beside the function body's.

A last bit may move a block in or out, and all later layers with it. So each layer is looked at with
the queries, keys and values that it has in the exported model itself: its blocks must be the rule's
but for ties, its output the function body's where both chose alike, else the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.arrays import Array, BoolArray
from trianglemix.custom_ops.block_sparse.contract import (
    ATTR_MASS,
    ATTR_MIN_LENGTH,
    OP_TYPE,
    OUTPUTS,
    BlockRule,
)
from trianglemix.custom_ops.block_sparse.reference import (
    BlockSparse,
    block_sparse_attention,
    misplaced_blocks,
)
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.operators import add_function
from trianglemix.custom_ops.reference import Call
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole
from trianglemix.exporter.graph.fold_rotation import UnfoldRotationPass
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.exporter.verify.comparisons import Checks
from trianglemix.exporter.verify.one_node import run_body
from trianglemix.exporter.verify.session import OpenModel
from trianglemix.exporter.verify.text_reading import Text

_READ: Final = (
    "query", "key", "value", "seqlens_k", "total_sequence_length", "prompt_length", "first_valid",
)  # fmt: skip
_WRITTEN: Final = (OUTPUTS[0], OUTPUTS[-1])
_BANDS: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-2}
"""How far, as a share, block sums and the mass they reach may be off: wider than in the kernels'
tests, since a model's scores may be larger numbers."""
_MASS: Final = 0.5  # a random text of a few tiles needs nearly all its blocks for much more
_FORM: Final = "verified_blocks.onnx"
Opener = Callable[[Path], OpenModel]


@dataclass(frozen=True)
class _Layer:
    """A layer that is looked at, as the exported file says it."""

    layer: int
    node: AttentionNode

    def attention(self, query: Array, value: Array) -> BlockSparse:
        """What it is, its head sizes those of what it read: not every file states them."""
        node = self.node
        sizes = query.shape[-1] // node.num_heads, value.shape[-1] // node.kv_num_heads
        shape = AttentionShape(node.num_heads, node.kv_num_heads, *sizes)
        return BlockSparse(shape, _rule(node), node.scale, node.softcap)


def exact_length(exported: Path) -> int:
    """The longest prompt (tokens) of which the form that is looked at chooses no block."""
    nodes = AttentionNode.all_of(ir.load(exported).graph)
    sparse = (node for node in nodes if node.role is LayerRole.BLOCK_SPARSE)
    return max((_rule(node).exact_length or 0 for node in sparse), default=0)


def compare_blocks(
    open_model: Opener, exported: Path, checks: Checks, text: Text
) -> list[VerifyReport]:
    """Reads `text` in one call; reports of the choice of blocks, and of the output.

    Raises:
        ExportError: the model does not open or run.
    """
    with _showing_its_layers(exported) as (path, layers):
        model = open_model(path)
        seen = model.run(checks.feeds(text.ids, text.mask, text.prompt))
        del model
    dtype = _coarser(checks)
    wrong, pairs = 0, []
    for layer in layers:
        call, attention, output, chosen = _call_of(layer, seen)
        wrong += len(misplaced_blocks(call, attention, chosen, _BANDS[dtype]))
        want = _expected(call, attention, chosen)
        real = text.mask[..., None] != 0
        pairs.append((np.where(real, output, 0), np.where(real, want, 0)))
    names = ", ".join(str(layer.layer) for layer in layers)
    tokens = text.total
    return [
        VerifyReport(f"choice of blocks in layers {names}", tokens, float(wrong), 0.0, not wrong),
        checks.judge(f"block-sparse layers {names}, kernel against function body", tokens, pairs),
    ]


def _coarser(checks: Checks) -> str:
    """The type that the layers round to."""
    return checks.dtype if checks.dtype in _BANDS else checks.manifest.cache_dtype


def _rule(node: AttentionNode) -> BlockRule:
    """As the form has it: prompts of any length choose, and few blocks hold what is wanted."""
    rule = node.rule
    assert isinstance(rule, BlockRule)
    return replace(rule, min_length=0, mass=min(rule.mass, _MASS))


@contextmanager
def _showing_its_layers(exported: Path) -> Iterator[tuple[Path, list[_Layer]]]:
    """A copy of the graph that ends in what its first, middle and last such layer see."""
    model = ir.load(exported)
    UnfoldRotationPass()(model)
    nodes = AttentionNode.all_of(model.graph)
    for sparse in (node for node in nodes if node.role is LayerRole.BLOCK_SPARSE):
        sparse.node.resize_outputs(len(OUTPUTS))
        sparse.node.outputs[-1].name = f"{sparse.node.name}/{OUTPUTS[-1]}"
        sparse.node.attributes.add(ir.AttrFloat32(ATTR_MASS, _rule(sparse).mass))
        sparse.node.attributes.add(ir.AttrInt64(ATTR_MIN_LENGTH, 0))
    add_function(model, OP_TYPE)
    order = {node.node: layer for layer, node in enumerate(_attentions(model.graph))}
    able = [node for node in nodes if node.role is LayerRole.BLOCK_SPARSE]
    layers, shown = [], []
    for node in (able[place] for place in sorted({0, len(able) // 2, len(able) - 1})):
        layers.append(_Layer(order[node.node], node))
        shown += _shown(model.graph, node, order[node.node])
    model.graph.outputs[:] = shown
    copy = exported.with_name(_FORM)
    try:
        ir.save(model, copy)
        yield copy, layers
    finally:
        copy.unlink(missing_ok=True)


def _attentions(graph: ir.Graph) -> list[AttentionNode]:
    """A node for each layer; those that were lowered have no other view than their place."""
    return [
        AttentionNode(node)
        for node in graph
        if node.op_type == "GroupQueryAttention" or AttentionNode.all_of([node])
    ]


def _shown(graph: ir.Graph, node: AttentionNode, layer: int) -> list[ir.Value]:
    """Outputs that are copies of the node's values: floats in float32, lengths as they are."""
    build, shown = GraphBuilder(graph, f"shown.{layer}"), []
    values = dict(zip(contract.INPUTS, node.node.inputs, strict=False))
    values |= {name: node.node.outputs[OUTPUTS.index(name)] for name in _WRITTEN}
    for name in (*_READ, *_WRITTEN):
        value = values[name]
        assert value is not None
        floats = name in (*_READ[:3], _WRITTEN[0])
        dtype = ir.DataType.FLOAT if floats else ir.DataType.INT32
        copy = build.cast(value, dtype)
        copy.name, copy.type = f"shown.{layer}.{name}", ir.TensorType(dtype)
        shown.append(copy)
    graph.extend(build.nodes)
    return shown


def _call_of(layer: _Layer, seen: dict[str, Array]) -> tuple[Call, BlockSparse, Array, BoolArray]:
    """The call of one layer over an empty cache, what it is, its output, and its blocks."""
    read = {name: seen[f"shown.{layer.layer}.{name}"] for name in (*_READ, *_WRITTEN)}
    output, blocks = (read.pop(name) for name in _WRITTEN)
    attention, batch = layer.attention(read["query"], read["value"]), len(output)
    shape = attention.shape
    total = int(read.pop("total_sequence_length").reshape(-1)[0])
    read |= {
        name: np.broadcast_to(read[name].reshape(-1), (batch,)).copy()
        for name in ("seqlens_k", "prompt_length", "first_valid")
    }
    past_key, past_value = (
        np.zeros((batch, shape.kv_num_heads, 0, size), np.float32)
        for size in (shape.head_size, shape.value_head_size)
    )
    call = Call(past_key=past_key, past_value=past_value, total_sequence_length=total, **read)
    return call, attention, output, blocks.astype(bool)


def _expected(call: Call, attention: BlockSparse, chosen: BoolArray) -> Array:
    """The body's output, and of heads that chose otherwise the reference's under their choice."""
    body, blocks = run_body(call, attention)
    same = (blocks == chosen).all(axis=(2, 3))  # [B, H]
    if same.all():
        return body
    other = block_sparse_attention(call, attention, chosen)[0]
    apart = (*same.shape, attention.shape.value_head_size)
    keep = np.broadcast_to(same[..., None], apart).reshape(len(same), 1, -1)
    return np.where(keep, body, other)
