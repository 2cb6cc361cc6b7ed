"""Whether the project's own runtime can run a graph, by its interface; or why it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.walk import is_op
from trianglemix.exporter.interface.graph_interface import GraphInterface
from trianglemix.manifest.feeds import (
    FeedError,
    carried_shape,
    unfed,
    why_not_carried,
    why_unfed,
)
from trianglemix.manifest.interface import (
    GraphInput,
    GraphOutput,
    Shape,
    carried_inputs,
    changed_on_the_way,
    fixed_batch,
    fixed_length,
    fixed_past,
    fixed_total,
    has_cache,
    with_role,
)

RECOMPUTE_LIMIT: Final = 4096
"""Tokens that a graph without a cache, which reads the whole text at every step, is given."""
_NUMBERS: Final = ("float16", "bfloat16", "float32", "float64", "unknown")
_MATRIX: Final = 2
_STATEFUL: Final = frozenset(
    {("com.microsoft", "CausalConvWithState"), ("com.microsoft", "LinearAttention")}
)


def why_not_run(interface: GraphInterface) -> str | None:
    """The first reason why the runtime cannot feed this graph, as a clause; None if it can."""
    return next(_obstacles(interface), None)


def _obstacles(interface: GraphInterface) -> Iterator[str]:
    inputs = interface.inputs
    yield from (why_unfed(value) for value in unfed(inputs))
    for name, size in (
        ("batch", fixed_batch(inputs)),
        ("number of new tokens", fixed_length(inputs)),
    ):
        if size not in (None, 1):
            yield f"its {name} is fixed at {size}"
    past, total = fixed_past(inputs), fixed_total(inputs)
    if past is not None:
        yield f"its cache has a fixed length of {past} slots, whatever they hold"
    if total is not None:
        yield f"its attention mask has a fixed length of {total}"
    for value in carried_inputs(inputs):
        if value.carried_from is None:
            yield why_not_carried(value)
        try:
            carried_shape(value, 1)
        except FeedError as error:
            yield str(error)
    yield from strange_logits(inputs, interface.outputs)
    for value in inputs:
        if value.dtype == "unknown":
            yield f"the file does not say of which type its input {value.name} is"
    changed = changed_on_the_way(inputs, interface.outputs)
    for value in carried_inputs(inputs):
        if changed[value.name] and value.dtype == "bfloat16":  # which NumPy does not have
            yield f"its output {value.carried_from} is not {value.name} of bfloat16 as it is"


def strange_logits(inputs: Sequence[GraphInput], outputs: Sequence[GraphOutput]) -> Iterator[str]:
    """Why no row of the vocabulary can be read from the logits for the last token, as clauses.

    Of two dimensions only a vocabulary per row of the batch will do; of three the vocabulary must
    be the last, and the first not that of the tokens.
    """
    logits = next(value for value in outputs if value.role == "logits")
    if logits.dtype not in _NUMBERS:
        yield f"its output {logits.name} holds {logits.dtype}, not a number for every next token"
    shape, ids = logits.shape, with_role(inputs, "input_ids")[0].shape
    if shape is not None and not _has_rows(shape, ids or (None, None)):
        sizes = ",".join("?" if size is None else str(size) for size in shape)
        yield f"its output {logits.name} [{sizes}] is not [batch, length, vocabulary]"


def _has_rows(logits: Shape, ids: Shape) -> bool:
    if len(logits) == _MATRIX:
        return logits[0] is not None and logits[0] == ids[0]
    if len(logits) != _MATRIX + 1:
        return False
    first, rows, last = logits
    transposed = isinstance(rows, int) and rows > 1 and not isinstance(last, int)
    return not transposed and (first in (None, ids[0]) or first != ids[1])


def takes_chunks(graph: ir.Graph, inputs: tuple[GraphInput, ...]) -> bool:
    """Whether a prompt may come in several calls: states must be seen to carry it on.

    Caches do, and without one a prompt is read at once anyway. Of a state it is known where it
    is put before the new tokens, as a convolution's is, or where an operator takes it that is
    made for it; other graphs may read a state only when they are given one token.
    """
    states = {value.name for value in with_role(inputs, "state")}
    return not has_cache(inputs) or all(
        _continues(node, value)
        for value in graph.inputs
        if value.name in states
        for node in value.consumers()
    )


def _continues(node: ir.Node, state: ir.Value) -> bool:
    if (node.domain, node.op_type) in _STATEFUL:
        return True
    return is_op(node, "Shape") or (is_op(node, "Concat") and node.inputs[0] is state)
