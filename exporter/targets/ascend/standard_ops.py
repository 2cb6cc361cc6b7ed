"""Spells fused and newer operators in those that ATC's parser reads.

What has no rule here stays, and the linter names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.builder import AttributeValue, NodeBuilder
from trianglemix.exporter.graph.walk import needed_input

_MICROSOFT: Final = "com.microsoft"
_REAL: Final = ir.DataType.FLOAT
Spelling = Callable[[NodeBuilder, ir.Node], list[ir.Value | None]]


class SpellOutPass(ir.passes.InPlacePass):
    """Every operator with a rule below becomes standard operators of the model's opset.

    Raises:
        RefusedError: a form of the operator that the rule does not cover; the node is named.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for count, node in enumerate(list(model.graph)):
            domain = "" if node.domain == "ai.onnx" else node.domain
            spelling = SPELLINGS.get((domain, node.op_type))
            if spelling is None:
                continue
            build = NodeBuilder(model.graph, f"standard/{node.name or count}")
            made = spelling(build, node)
            model.graph.insert_before(node, build.nodes)
            for old, new in zip(node.outputs, made, strict=False):
                if new is not None:
                    new.type, new.shape = old.type, old.shape  # later rules ask for the rank
                    old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _real(build: NodeBuilder, value: float) -> ir.Value:
    return build.constant(f"float_{value!r}", np.array(value, np.float32))


def _rms(build: NodeBuilder, x: ir.Value, scale: ir.Value, epsilon: float, axis: int) -> ir.Value:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, the mean in float32."""
    if axis != -1:
        raise RefusedError(f"a norm over axis {axis}, not over the last one, is not supported")
    wide = build.cast(x, _REAL)
    square = build.op("Mul", wide, wide)
    mean = (
        build.op("ReduceMean", square, build.ints(-1), keepdims=1)
        if build.opset >= 18
        else build.op("ReduceMean", square, axes=[-1], keepdims=1)
    )
    root = build.op("Sqrt", build.op("Add", mean, _real(build, epsilon)))
    normed = build.op("CastLike", build.op("Div", wide, root), x)
    return build.op("Mul", normed, scale)


def _rms_norm(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    x, scale = needed_input(node, 0), needed_input(node, 1)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    axis = node.attributes.get_int("axis", -1)
    if x.shape is not None and axis == len(x.shape) - 1:
        axis = -1
    return [_rms(build, x, scale, epsilon, axis)]


def _skip_rms_norm(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Outputs: the norm, two that nobody uses, the sum."""
    total = build.op("Add", needed_input(node, 0), needed_input(node, 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        total = build.op("Add", total, node.inputs[3])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return [_rms(build, total, needed_input(node, 2), epsilon, -1), None, None, total]


def _skip_layer_norm(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Inputs x, skip, gamma, beta, bias; outputs the norm, two that nobody uses, the sum."""
    x, skip, gamma, beta, bias = [*node.inputs, None, None][:5]
    total = build.op("Add", x, skip)
    if bias is not None:
        total = build.op("Add", total, bias)
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    normed = build.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=epsilon)
    return [normed, None, None, total]


def _fused_product(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
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
            value = build.op("Transpose", value, perm=[*axes[:-2], axes[-1], axes[-2]])
        sides.append(value)
    product = build.op("MatMul", *sides)
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        return [product]
    return [build.op("Mul", product, build.op("CastLike", _real(build, alpha), product))]


def _rotary_microsoft(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    x, positions, cos, sin = (needed_input(node, index) for index in range(4))
    if positions.shape is not None and len(positions.shape) == 1:
        raise RefusedError(f"node {node.name} counts its positions itself; pass them as [B, S]")
    return [_rotate(build, node, x, (positions, cos, sin))]


def _rotary_standard(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    x, cos, sin = (needed_input(node, index) for index in range(3))
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    return [_rotate(build, node, x, (positions, cos, sin))]


def _rotate(
    build: NodeBuilder,
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
    rows = build.op("Reshape", x, build.ints(0, 0, heads, -1)) if flat else x
    turning, still = rows, None
    if width:
        turning = build.op("Slice", rows, build.ints(0), build.ints(width), build.ints(-1))
        end = build.ints(np.iinfo(np.int64).max)
        still = build.op("Slice", rows, build.ints(width), end, build.ints(-1))
    if positions is not None:
        index = _inside(build, positions, tables[0])
        tables = [build.op("Gather", table, index, axis=0) for table in tables]
    tables = [build.op("Unsqueeze", table, build.ints(2 if flat else 1)) for table in tables]
    turned = _turned(build, turning, tables, node.attributes.get_int("interleaved", 0))
    if still is not None:
        turned = build.op("Concat", turned, still, axis=-1)
    return build.op("Reshape", turned, build.op("Shape", x)) if flat else turned


def _inside(build: NodeBuilder, positions: ir.Value, table: ir.Value) -> ir.Value:
    """Positions held at a stored table's last row: pads may lie behind the end of the context.

    A table that the graph computes has the rows that its own positions ask for.
    """
    rows = None if table.shape is None else table.shape[0]
    if not isinstance(rows, int):
        return positions
    last = build.constant(f"int64_{rows - 1}", np.array(rows - 1, np.int64))
    return build.op("Min", positions, last)


def _turned(build: NodeBuilder, x: ir.Value, tables: list[ir.Value], interleaved: int) -> ir.Value:
    """`(a cos - b sin, b cos + a sin)` with halves a, b of the last axis, or its even and odd."""
    cos, sin = tables
    if interleaved:
        paired, last = build.op("Reshape", x, build.ints(0, 0, 0, -1, 2)), build.ints(-1)
        first, second = (
            build.op("Squeeze", build.op("Gather", paired, build.ints(index), axis=-1), last)
            for index in (0, 1)
        )
    else:
        split = build.node("Split", [x], attributes=_halves(build), num_outputs=2)
        first, second = split.outputs
    low = build.op("Sub", build.op("Mul", first, cos), build.op("Mul", second, sin))
    high = build.op("Add", build.op("Mul", second, cos), build.op("Mul", first, sin))
    if not interleaved:
        return build.op("Concat", low, high, axis=-1)
    parts = [build.op("Unsqueeze", part, build.ints(-1)) for part in (low, high)]
    return build.op("Reshape", build.op("Concat", *parts, axis=-1), build.op("Shape", x))


def _halves(build: NodeBuilder) -> dict[str, AttributeValue]:
    return {"axis": -1, "num_outputs": 2} if build.opset >= 18 else {"axis": -1}


def _gelu(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    if node.attributes.get_string("approximate", "none") == "tanh":
        return _gelu_tanh(build, node)
    x = needed_input(node, 0)
    half, one, root = (
        build.op("CastLike", _real(build, value), x) for value in (0.5, 1.0, 2**-0.5)
    )
    erf = build.op("Erf", build.op("Mul", x, root))
    return [build.op("Mul", build.op("Mul", x, half), build.op("Add", erf, one))]


def _gelu_tanh(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    x = needed_input(node, 0)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        x = build.op("Add", x, node.inputs[1])
    wide = build.cast(x, _REAL)
    cube = build.op("Mul", build.op("Mul", wide, wide), wide)
    inner = build.op("Add", wide, build.op("Mul", cube, _real(build, 0.044715)))
    tanh = build.op("Tanh", build.op("Mul", inner, _real(build, float(np.sqrt(2 / np.pi)))))
    weight = build.op("Mul", build.op("Add", tanh, _real(build, 1.0)), _real(build, 0.5))
    return [build.op("CastLike", build.op("Mul", wide, weight), x)]


def _sigmoid_gate(build: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """QuickGelu and Swish: `x * sigmoid(alpha * x)`."""
    x = needed_input(node, 0)
    default = 1.702 if node.op_type == "QuickGelu" else 1.0
    alpha = node.attributes.get_float("alpha", default)
    inner = x
    if alpha != 1.0:
        inner = build.op("Mul", x, build.op("CastLike", _real(build, alpha), x))
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
