"""Spells fused and newer operators in those that ATC's parser reads.

What has no rule here stays, and the linter names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.walk import needed_input

_MICROSOFT: Final = "com.microsoft"
_REAL: Final = ir.DataType.FLOAT
Spelling = Callable[[GraphBuilder, ir.Node], list[ir.Value | None]]


class SpellOutPass(ir.passes.InPlacePass):
    """Every operator with a rule below becomes standard operators of the model's opset.

    Raises:
        RefusedError: a form of the operator that the rule does not cover; the node is named.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, source = False, GraphBuilder(model.graph, "source")
        for node in list(model.graph):
            domain = "" if node.domain == "ai.onnx" else node.domain
            spelling = SPELLINGS.get((domain, node.op_type))
            if spelling is None:
                continue
            build = source.at(node)
            build.replace(node, *spelling(build, node))
            modified = True
        return ir.passes.PassResult(model, modified)


def _rms(build: GraphBuilder, x: ir.Value, scale: ir.Value, epsilon: float, axis: int) -> ir.Value:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, the mean in float32."""
    if axis != -1:
        raise RefusedError(f"a norm over axis {axis}, not over the last one, is not supported")
    wide = build.cast(x, _REAL)
    square = build.op("Mul", wide, wide)
    mean = build.reduce("ReduceMean", square, -1, keepdims=1)
    root = build.op("Sqrt", build.op("Add", mean, build.scalar(epsilon)))
    normed = build.op("CastLike", build.op("Div", wide, root), x)
    return build.op("Mul", normed, scale)


def _rms_norm(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    x, scale = needed_input(node, 0), needed_input(node, 1)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    axis = node.attributes.get_int("axis", -1)
    if x.shape is not None and axis == len(x.shape) - 1:
        axis = -1
    return [_rms(build, x, scale, epsilon, axis)]


def _skip_rms_norm(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Outputs: the norm, two that nobody uses, the sum."""
    total = build.op("Add", needed_input(node, 0), needed_input(node, 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        total = build.op("Add", total, node.inputs[3])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return [_rms(build, total, needed_input(node, 2), epsilon, -1), None, None, total]


def _skip_layer_norm(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Inputs x, skip, gamma, beta, bias; outputs the norm, two that nobody uses, the sum."""
    x, skip, gamma, beta, bias = [*node.inputs, None, None][:5]
    total = build.op("Add", x, skip)
    if bias is not None:
        total = build.op("Add", total, bias)
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    normed = build.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=epsilon)
    return [normed, None, None, total]


def _fused_product(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    """`alpha * op(a) op(b)`, each transposed in its last two axes if asked."""
    sides = []
    for index, name in ((0, "A"), (1, "B")):
        value = needed_input(node, index)
        if node.attributes.get_int(f"transBatch{name}", 0):
            raise RefusedError(f"node {node.name} has transBatch{name}=1, which is not supported")
        if node.attributes.get_int(f"trans{name}", 0):
            if value.shape is None:
                raise RefusedError(f"node {node.name} transposes an input of unknown rank")
            axes = list(range(len(value.shape)))
            value = build.transpose(value, *axes[:-2], axes[-1], axes[-2])
        sides.append(value)
    product = build.op("MatMul", *sides)
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        return [product]
    return [build.op("Mul", product, build.op("CastLike", build.scalar(alpha), product))]


def _rotary_microsoft(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    x, positions, cos, sin = (needed_input(node, index) for index in range(4))
    if positions.shape is not None and len(positions.shape) == 1:
        raise RefusedError(f"node {node.name} counts its positions itself; pass them as [B, S]")
    return [_rotate(build, node, x, (positions, cos, sin))]


def _rotary_standard(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    x, cos, sin = (needed_input(node, index) for index in range(3))
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    return [_rotate(build, node, x, (positions, cos, sin))]


def _rotate(
    build: GraphBuilder,
    node: ir.Node,
    x: ir.Value,
    angles: tuple[ir.Value | None, ir.Value, ir.Value],
) -> ir.Value:
    """Rotates `[B, S, H*D]` (with num_heads) or `[B, H, S, D]`; tables `[positions, R/2]`, or
    `[B, S, R/2]` where there are no positions. Pads beyond a table take its last row.
    """
    positions, *tables = angles
    heads = node.attributes.get_int("num_heads", 0)
    flat = (x.shape is not None and len(x.shape) == 3) or (x.shape is None and heads > 0)
    if flat and not heads:
        raise RefusedError(f"node {node.name} does not say how many heads it rotates")
    width = node.attributes.get_int("rotary_embedding_dim", 0)
    rows = build.reshape(x, 0, 0, heads, -1) if flat else x
    turning, still = rows, None
    if width:
        turning = build.slice(rows, -1, 0, width)
        still = build.slice(rows, -1, width, np.iinfo(np.int64).max)
    if positions is not None:
        index = _inside(build, positions, tables[0])
        tables = [build.op("Gather", table, index, axis=0) for table in tables]
    tables = [build.unsqueeze(table, 2 if flat else 1) for table in tables]
    turned = _turned(build, turning, tables, node.attributes.get_int("interleaved", 0))
    if still is not None:
        turned = build.concat(turned, still, axis=-1)
    return build.op("Reshape", turned, build.op("Shape", x)) if flat else turned


def _inside(build: GraphBuilder, positions: ir.Value, table: ir.Value) -> ir.Value:
    """Positions held at a stored table's last row: pads may lie behind the end of the context.

    A table that the graph computes has the rows that its own positions ask for.
    """
    rows = None if table.shape is None else table.shape[0]
    if not isinstance(rows, int):
        return positions
    return build.op("Min", positions, build.int64(rows - 1))


def _turned(build: GraphBuilder, x: ir.Value, tables: list[ir.Value], interleaved: int) -> ir.Value:
    """`(a cos - b sin, b cos + a sin)` with halves a, b of the last axis, or its even and odd."""
    cos, sin = tables
    if interleaved:
        paired = build.reshape(x, 0, 0, 0, -1, 2)
        first, second = (
            build.squeeze(build.op("Gather", paired, build.ints(index), axis=-1), -1)
            for index in (0, 1)
        )
    else:
        count = {"num_outputs": 2} if build.opset >= 18 else {}
        split = build.node("Split", [x], attributes={"axis": -1, **count}, num_outputs=2)
        first, second = split.outputs
    low = build.op("Sub", build.op("Mul", first, cos), build.op("Mul", second, sin))
    high = build.op("Add", build.op("Mul", second, cos), build.op("Mul", first, sin))
    if not interleaved:
        return build.concat(low, high, axis=-1)
    parts = [build.unsqueeze(part, -1) for part in (low, high)]
    return build.op("Reshape", build.concat(*parts, axis=-1), build.op("Shape", x))


def _gelu(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    if node.attributes.get_string("approximate", "none") == "tanh":
        return _gelu_tanh(build, node)
    x = needed_input(node, 0)
    half, one, root = (
        build.op("CastLike", build.scalar(value), x) for value in (0.5, 1.0, 2**-0.5)
    )
    erf = build.op("Erf", build.op("Mul", x, root))
    return [build.op("Mul", build.op("Mul", x, half), build.op("Add", erf, one))]


def _gelu_tanh(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    x = needed_input(node, 0)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        x = build.op("Add", x, node.inputs[1])
    wide = build.cast(x, _REAL)
    cube = build.op("Mul", build.op("Mul", wide, wide), wide)
    inner = build.op("Add", wide, build.op("Mul", cube, build.scalar(0.044715)))
    tanh = build.op("Tanh", build.op("Mul", inner, build.scalar(float(np.sqrt(2 / np.pi)))))
    weight = build.op("Mul", build.op("Add", tanh, build.scalar(1.0)), build.scalar(0.5))
    return [build.op("CastLike", build.op("Mul", wide, weight), x)]


def _sigmoid_gate(build: GraphBuilder, node: ir.Node) -> list[ir.Value | None]:
    """QuickGelu and Swish: `x * sigmoid(alpha * x)`."""
    x = needed_input(node, 0)
    default = 1.702 if node.op_type == "QuickGelu" else 1.0
    alpha = node.attributes.get_float("alpha", default)
    inner = x
    if alpha != 1.0:
        inner = build.op("Mul", x, build.op("CastLike", build.scalar(alpha), x))
    return [build.op("Mul", x, build.op("Sigmoid", inner))]


SPELLINGS: Final[dict[tuple[str, str], Spelling]] = {
    ("", "RMSNormalization"): _rms_norm,
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    (_MICROSOFT, "SimplifiedLayerNormalization"): _rms_norm,
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    (_MICROSOFT, "SkipLayerNormalization"): _skip_layer_norm,
    (_MICROSOFT, "FusedMatMul"): _fused_product,
    (_MICROSOFT, "RotaryEmbedding"): _rotary_microsoft,
    ("", "RotaryEmbedding"): _rotary_standard,
    ("", "Gelu"): _gelu,
    (_MICROSOFT, "Gelu"): _gelu,
    (_MICROSOFT, "FastGelu"): _gelu_tanh,
    (_MICROSOFT, "QuickGelu"): _sigmoid_gate,
    ("", "Swish"): _sigmoid_gate,
}
