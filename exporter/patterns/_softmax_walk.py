"""Reads decomposed attention from the graph around a Softmax; nothing is measured here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.walk import (
    Factor,
    Heads,
    is_op,
    layout_chain,
    needed_input,
    peel_factor,
    trace_heads,
)

_ON_SCORES: Final = (
    "Add", "Sub", "Mul", "Div", "Where", "Tanh", "Max", "Min", "Clip", "Cast", "Identity",
)  # fmt: skip
_ON_WEIGHTS: Final = ("Cast", "Identity", "Dropout", "Where", "Mul", "Slice")
_MAX_STEPS: Final = 24


@dataclass(frozen=True)
class Walk:
    """The site as the graph's shape tells it.

    `outer` factors stand between a Tanh and the Softmax (the softcap; None without a Tanh),
    `inner` ones elsewhere. `outputs` are the result and what only reshapes and transposes it.
    """

    softmax: ir.Node
    scores: ir.Value
    key_operand: ir.Value
    query: ir.Value
    key: Heads
    value: Heads
    inner: tuple[Factor, ...]
    outer: tuple[Factor, ...] | None
    outputs: tuple[ir.Value, ...]

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
    """The site between a Softmax and the MatMul with the values; or why there is none."""
    path = _path_to_scores(needed_input(softmax, 0), content, _MAX_STEPS)
    if path is None:
        return "no product of queries and keys found behind the Softmax"
    *between, matmul = path
    inner, outer = _factors_on_path(between, content)
    query, query_factors = _peel_all(needed_input(matmul, 0), content)
    key = trace_heads(needed_input(matmul, 1), "BHDT", content)
    value = trace_heads(needed_input(product, 1), "BHTD", content)
    trouble = _trouble(key, value)
    if trouble is not None:
        return trouble
    return Walk(
        softmax=softmax,
        scores=matmul.outputs[0],
        key_operand=needed_input(matmul, 1),
        query=query,
        key=key,
        value=value,
        inner=(*inner, *query_factors, *key.factors),
        outer=outer,
        outputs=tuple(layout_chain(product.outputs[0])),
    )


def _trouble(key: Heads, value: Heads) -> str | None:
    if value.factors:
        return "its values are scaled inside the attention"
    if (key.past is None) != (value.past is None):
        return "only one of keys and values is appended to a cache"
    for name, heads in (("keys", key), ("values", value)):
        allowed = ("BHTD",) if heads.past is not None else ("BHTD", "BTHD")
        if heads.axes not in allowed:
            return f"the axes of its {name} are {heads.axes}, not {' or '.join(allowed)}"
    return None


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


def _peel_all(
    value: ir.Value, content: Collection[ir.Value]
) -> tuple[ir.Value, tuple[Factor, ...]]:
    factors: list[Factor] = []
    while (peeled := peel_factor(value, content)) is not None:
        value = peeled[0]
        if peeled[1] is not None:
            factors.append(peeled[1])
    return value, tuple(factors)
