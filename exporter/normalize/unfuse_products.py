"""Takes fused products of activations apart, so that attention is found in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.graph.roles import rank
from trianglemix.exporter.graph.walk import is_op, needed_input

_DOMAIN: Final = "com.microsoft"
_SWAPPED: Final = {2: [1, 0], 3: [0, 2, 1], 4: [0, 1, 3, 2]}
_LETTERS = "ABCDEFGH"  # stand for the axes of an ellipsis; equations have small letters


class UnfuseMatMulPass(ir.passes.InPlacePass):
    """`com.microsoft::FusedMatMul` becomes Transpose, MatMul and Mul.

    Only where neither side is a constant: products with weights are no attention and stay. So do
    those that move the batch axis, and those of an unknown number of axes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fused = [node for node in model.graph if _is_of_activations(node)]
        source = GraphBuilder(model.graph, "source")
        for node in fused:
            _split_fused(source.at(node), node)
        return ir.passes.PassResult(model, bool(fused))


def _is_of_activations(node: ir.Node) -> bool:
    if (node.domain, node.op_type) != (_DOMAIN, "FusedMatMul") or node.outputs[0].is_graph_output():
        return False
    if any(node.attributes.get_int(f"transBatch{side}", 0) for side in "AB"):
        return False
    for value, side in zip(node.inputs[:2], "AB", strict=True):
        if value is None or ir.convenience.get_const_tensor(value) is not None:
            return False
        if node.attributes.get_int(f"trans{side}", 0) and _axes(value, node) is None:
            return False
    return True


def _axes(value: ir.Value, node: ir.Node) -> list[int] | None:
    """The order that swaps the last two axes of an operand."""
    return _SWAPPED.get(rank(value) or rank(node.outputs[0]) or 0)


def _split_fused(build: GraphBuilder, node: ir.Node) -> None:
    operands = []
    for value, side in zip(node.inputs[:2], "AB", strict=True):
        assert value is not None
        swapped = node.attributes.get_int(f"trans{side}", 0)
        axes = _axes(value, node) if swapped else None
        operands.append(value if axes is None else build.transpose(value, *axes))
    old, alpha = node.outputs[0], node.attributes.get_float("alpha", 1.0)
    product = build.op("MatMul", *operands)
    if alpha != 1.0:
        dtype = old.dtype or operands[0].dtype or ir.DataType.FLOAT
        product = build.op("Mul", product, build.scalar(alpha, dtype))
    build.replace(node, product)


@dataclass(frozen=True)
class _Product:
    """An Einsum as a matrix product of `left` and `right`, which may be its operands swapped.

    `lead` labels come before the row and the column; those that only the left has are `extra`,
    along which the right is broadcast.
    """

    swapped: bool
    left: str
    right: str
    out: str
    lead: str
    extra: str
    row: str
    column: str
    summed: str


class UnfuseEinsumPass(ir.passes.InPlacePass):
    """Einsums that are one product of matrices become Transpose, Unsqueeze and MatMul.

    Only where neither side is a constant, and one label is summed: others are no attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, source = False, GraphBuilder(model.graph, "source")
        for node in list(model.graph):
            product = _read(node)
            if product is not None:
                _split_einsum(source.at(node), node, product)
                modified = True
        return ir.passes.PassResult(model, modified)


def _read(node: ir.Node) -> _Product | None:
    if not is_op(node, "Einsum") or len(node.inputs) != 2 or node.outputs[0].is_graph_output():
        return None
    if any(x is None or ir.convenience.get_const_tensor(x) is not None for x in node.inputs):
        return None
    terms = _terms(node)
    if terms is None or any(len(set(term)) != len(term) for term in terms):
        return None
    left, right, out = terms
    swapped = out[-1:] in left  # the column must be the right's
    if swapped:
        left, right = right, left
    both = set(left) & set(right)
    summed = both - set(out)
    columns, rows = set(right) - set(left), [x for x in out if x in left and x not in right]
    if len(summed) != 1 or len(columns) != 1 or not rows or out[-1:] not in columns:
        return None
    if (set(left) | set(right)) - set(out) != summed:
        return None
    lead = "".join(x for x in out if x in both or x in rows[:-1])
    extra = "".join(rows[:-1])
    return _Product(swapped, left, right, out, lead, extra, rows[-1], columns.pop(), summed.pop())


def _terms(node: ir.Node) -> tuple[str, str, str] | None:
    """Labels of both operands and the result; an ellipsis as letters of its own."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    given, arrow, out = equation.partition("->")
    terms = given.split(",")
    if len(terms) != 2:
        return None
    if not arrow:
        out = "".join(sorted(x for x in set(given) - {",", "."} if given.count(x) == 1))
        out = "..." * ("..." in given) + out
    if "..." in equation:
        counts = {_ellipsis(term, value) for term, value in zip(terms, node.inputs, strict=True)}
        count = counts.pop() if len(counts) == 1 else None
        if count is None or count > len(_LETTERS):
            return None
        terms, out = (
            [x.replace("...", _LETTERS[:count]) for x in terms],
            out.replace("...", _LETTERS[:count]),
        )
    return terms[0], terms[1], out


def _ellipsis(term: str, value: ir.Value | None) -> int | None:
    """How many axes the ellipsis of an operand stands for."""
    axes = None if value is None else rank(value)
    if "..." not in term:
        return 0
    return None if axes is None else axes - len(term) + 3


def _split_einsum(build: GraphBuilder, node: ir.Node, product: _Product) -> None:
    values = [needed_input(node, index) for index in range(2)]
    left, right = values[::-1] if product.swapped else values
    p = product
    left = _ordered(build, left, p.left, p.lead + p.row + p.summed)
    shared = "".join(x for x in p.lead if x not in p.extra)
    right = _ordered(build, right, p.right, shared + p.summed + p.column)
    if p.extra:
        right = build.unsqueeze(right, *(p.lead.index(x) for x in p.extra))
    made = build.op("MatMul", left, right)
    build.replace(node, _ordered(build, made, p.lead + p.row + p.column, p.out))


def _ordered(build: GraphBuilder, value: ir.Value, labels: str, wanted: str) -> ir.Value:
    if labels == wanted:
        return value
    return build.transpose(value, *(labels.index(label) for label in wanted))
