"""Reads decomposed attention from the graph around a Softmax; nothing is measured here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.head_trace import Heads, axes_before_reshape, trace_heads
from trianglemix.exporter.graph.walk import (
    Factor,
    is_op,
    layout_chain,
    needed_input,
    peel_factor,
    producer_of,
)

_VIEWS: Final = ("Reshape", "Unsqueeze", "Squeeze")
_ON_SCORES: Final = (
    "Add", "Sub", "Mul", "Div", "Where", "Tanh", "Max", "Min", "Clip", "Cast", "Identity", *_VIEWS,
)  # fmt: skip
_ON_WEIGHTS: Final = ("Cast", "Identity", "Dropout", "Where", "Mul", "Slice", *_VIEWS)
_MAX_STEPS: Final = 24
_PRODUCT_AXES: Final = {3: "NST", 4: "BHST", 5: "BHRST"}
"""Axes of the scores, by how many they have: N is batch and heads in one, R query heads of H."""


@dataclass(frozen=True)
class Walk:
    """The site as the graph's shape tells it.

    `outer` factors stand between a Tanh and the Softmax (the softcap; None without a Tanh),
    `inner` ones elsewhere. `outputs` are the result and what only reshapes and transposes it.
    `axes` names the axes of the scores, `query_axes` those of the queries (S new tokens, T all).
    """

    softmax: ir.Node
    scores: ir.Value
    axes: str
    query_operand: ir.Value
    key_operand: ir.Value
    query: ir.Value
    query_axes: str
    key: Heads
    value: Heads
    inner: tuple[Factor, ...]
    outer: tuple[Factor, ...] | None
    outputs: tuple[ir.Value, ...]
    views: bool

    @property
    def weights(self) -> ir.Value:
        """What the values are summed with."""
        product = self.outputs[0].producer()
        assert product is not None
        return needed_input(product, 0)

    @property
    def has_past(self) -> bool:
        return self.key.past is not None

    @property
    def boundary(self) -> list[ir.Value]:
        """Queries, and keys and values as new tokens and past."""
        values = [self.query, self.key.value, self.value.value, self.key.past, self.value.past]
        return [value for value in values if value is not None]

    @property
    def factors(self) -> list[Factor]:
        return [*self.inner, *(self.outer or ())]

    @property
    def one_head_does(self) -> bool:
        """Whether scores of one head stand for all of them: nothing counts heads after them."""
        return len(self.axes) == 4 and not self.views


def weighted_sum(softmax: ir.Node, content: Collection[ir.Value]) -> ir.Node | None:
    """The MatMul of the weights with values that depend on the input, if there is one."""
    value = softmax.outputs[0]
    for _ in range(_MAX_STEPS):
        readers = [node for node in value.consumers() if not is_op(node, "IsNaN", "Shape")]
        if len(readers) != 1:
            return None
        (reader,) = readers
        if is_op(reader, "MatMul"):
            left, right = reader.inputs
            return reader if left is value and right in content else None
        if not is_op(reader, *_ON_WEIGHTS):
            return None
        value = reader.outputs[0]
    return None


def walk_back(softmax: ir.Node, product: ir.Node, content: Collection[ir.Value]) -> Walk | str:
    """The site between a Softmax and the MatMul with the values; or why there is none.

    Raises:
        CutError: keys or values come from a cache that the operator cannot read.
    """
    path = _path_to_scores(needed_input(softmax, 0), content, _MAX_STEPS)
    if path is None:
        return _why_no_scores(softmax)
    *between, matmul = path
    inner, outer = _factors_on_path(between, content)
    key_operand, value_operand = needed_input(matmul, 1), needed_input(product, 1)
    axes = _PRODUCT_AXES.get(_rank(matmul) or 4)
    value_axes = _PRODUCT_AXES.get(_rank(product) or 4)
    if axes is None or value_axes is None:
        return f"its scores have {_rank(matmul)} axes, not batch, heads, rows and keys"
    query, query_axes, query_factors = _trace_query(needed_input(matmul, 0), axes, content)
    key = trace_heads(key_operand, axes[:-2] + "DT", content)
    value = trace_heads(value_operand, value_axes[:-2] + "TD", content)
    trouble = _trouble(key, value)
    if trouble is not None:
        return trouble
    after = _nodes_to(softmax, product)
    return Walk(
        softmax=softmax,
        scores=matmul.outputs[0],
        axes=axes,
        query_operand=needed_input(matmul, 0),
        key_operand=key_operand,
        query=query,
        query_axes=query_axes,
        key=key,
        value=value,
        inner=(*inner, *query_factors, *key.factors),
        outer=outer,
        outputs=tuple(layout_chain(product.outputs[0])),
        views=any(is_op(node, *_VIEWS) for node in (*between, *after)),
    )


def sizes_by_axis(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a value with these axes; `sizes` holds B, H, R, S, T and D."""
    known = {**sizes, "N": sizes["B"] * sizes["H"] * (1 if "R" in axes else sizes["R"])}
    query_heads = "R" not in axes and "S" in axes
    known["H"] = sizes["H"] * sizes["R"] if query_heads else sizes["H"]
    return tuple(known[axis] for axis in axes)


def _trouble(key: Heads, value: Heads) -> str | None:
    if value.factors:
        return "its values are scaled inside the attention"
    if (key.past is None) != (value.past is None):
        return "only one of keys and values is appended to a cache"
    for name, heads in (("keys", key), ("values", value)):
        if heads.axes not in ("BHTD", "BTHD", "BHDT"):
            return (
                f"the axes of its {name} cannot be told at {heads.value.name}: batch, heads, "
                "tokens and size must come apart somewhere behind the product"
            )
    return None


def _why_no_scores(softmax: ir.Node) -> str:
    value = softmax.inputs[0]
    for _ in range(_MAX_STEPS):
        source = None if value is None else value.producer()
        if source is None:
            break
        if is_op(source, "Concat"):
            return (
                f"its scores are joined with something else before the Softmax ({source.name}): "
                "attention sinks, which the operator has no counterpart for"
            )
        if is_op(source, "DequantizeLinear"):
            return (
                f"its scores are quantised ({source.name}): quantise the weights alone "
                "(onnxruntime's quantizers: extra_options={'MatMulConstBOnly': True})"
            )
        if not is_op(source, *_ON_SCORES):
            break
        value = source.inputs[0]
    return "no product of queries and keys found behind the Softmax"


def _rank(product: ir.Node) -> int | None:
    for value in (product.outputs[0], needed_input(product, 1), needed_input(product, 0)):
        if value.shape is not None:
            return len(value.shape)
        transpose = producer_of(value, "Transpose")
        order = transpose.attributes.get_ints("perm", ()) if transpose else ()
        if order:
            return len(order)
    return None


def _nodes_to(softmax: ir.Node, product: ir.Node) -> list[ir.Node]:
    """Nodes on the weights' way to the product with the values."""
    nodes: list[ir.Node] = []
    node = needed_input(product, 0).producer()
    while node is not None and node is not softmax and len(nodes) < _MAX_STEPS:
        nodes.append(node)
        ahead = [value.producer() for value in node.inputs if value is not None]
        node = next((n for n in ahead if n is not None and is_op(n, *_ON_WEIGHTS, "Softmax")), None)
    return nodes


def _path_to_scores(
    value: ir.Value, content: Collection[ir.Value], steps: int
) -> list[ir.Node] | None:
    """Nodes from a value back to the product of queries and keys, that product last."""
    node = value.producer()
    if node is None or steps == 0:
        return None
    if is_op(node, "MatMul"):
        return [node] if all(before in content for before in node.inputs) else None
    if not is_op(node, *_ON_SCORES):
        return None
    for before in node.inputs:
        if before is not None and before in content:
            path = _path_to_scores(before, content, steps - 1)
            if path is not None:
                return [node, *path]
    return None


def _factors_on_path(
    between: Sequence[ir.Node], content: Collection[ir.Value]
) -> tuple[tuple[Factor, ...], tuple[Factor, ...] | None]:
    """`(inner, outer)` factors of the scores, as in `Walk`."""
    inner: list[Factor] = []
    outer: tuple[Factor, ...] | None = None
    for node in between:
        if is_op(node, "Tanh"):
            outer, inner = tuple(inner), []
        peeled = peel_factor(node.outputs[0], content)
        if peeled is not None and peeled[1] is not None:
            inner.append(peeled[1])
    return tuple(inner), outer


def _trace_query(
    value: ir.Value, score_axes: str, content: Collection[ir.Value]
) -> tuple[ir.Value, str, tuple[Factor, ...]]:
    """Queries before factors and views, their axes, the factors.

    It stops where every axis has one meaning; with more or fewer axes, at the operand.
    """
    axes = score_axes[:-1] + "D"
    factors: list[Factor] = []
    best = (value, axes, 0)
    while True:
        peeled = peel_factor(value, content)
        view = producer_of(value, "Reshape")
        if peeled is not None:
            value = peeled[0]
            if peeled[1] is not None:
                factors.append(peeled[1])
        elif axes != "BHSD" and view is not None:
            value = needed_input(view, 0)
            axes = axes_before_reshape(axes, None if value.shape is None else len(value.shape))
            if axes != "BHSD":
                break
        else:
            break
        best = (value, axes, len(factors))
    return best[0], best[1], tuple(factors[: best[2]])
