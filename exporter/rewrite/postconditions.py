"""What must hold of a rewritten graph before it is written: what every route promises."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir
from trianglemix.exporter.attention.attention_probe import CallSizes, ProbeInputs
from trianglemix.exporter.attention.cutout import CutError, cut_out, depends_on_weights, run_cut
from trianglemix.exporter.attention.lengths import PROMPT_LENGTH
from trianglemix.exporter.attention.sites import AttentionSite, MatchContext
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.attention_node import (
    functions_needed,
    functions_of_ours,
    is_attention,
)
from trianglemix.exporter.graph.roles import GraphRoles

logger = logging.getLogger(__name__)
_SIZES = CallSizes(batch=1, length=67, past=30)  # no head count, head size or constant is 67 or 97


def check_exported(
    model: ir.Model, sites: Sequence[AttentionSite], interface: tuple[list[str], list[str]]
) -> None:
    """The old attentions are gone, names and order of inputs and outputs are the source's.

    `interface` holds the source's input and output names.

    Raises:
        RefusedError: an old attention is still needed by something.
        AssertionError: our own defect.
    """
    graph = model.graph
    left = set(graph)
    for site in sites:
        if site.anchor in left and not is_attention(site.anchor):
            raise RefusedError(
                f"something besides attention uses the inside of {site.anchor.name or site.form} "
                f"(layer {site.layer}), so it cannot be replaced"
            )
    inputs, outputs = interface
    names = [name for name in interface_of(graph)[0] if name != PROMPT_LENGTH]
    wanted = [name for name in inputs if name != PROMPT_LENGTH]
    assert names == wanted, f"inputs became {names}, were {wanted}"
    assert [value.name for value in graph.outputs] == outputs, "outputs changed"
    _check_order(graph)
    given = functions_of_ours(model)
    assert given == functions_needed(graph), "an operator's function and its nodes go together"


def _check_order(graph: ir.Graph) -> None:
    """Every value is made before it is used, under a name of its own."""
    made: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    names = {value.name for value in made}
    for node in graph:
        missing = [value for value in node.inputs if value is not None and value not in made]
        assert not missing, f"{node.name} uses {missing[0].name} before it is made"
        for value in node.outputs:
            assert not value.name or value.name not in names, f"{value.name} is made twice"
            names.add(value.name)
        made.update(node.outputs)


def interface_of(graph: ir.Graph) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs that must be given, and of its outputs, in order."""
    given = [str(value.name) for value in graph.inputs if value.name not in graph.initializers]
    return given, [str(value.name) for value in graph.outputs]


def check_no_square_left(graph: ir.Graph, roles: GraphRoles) -> None:
    """No value that is made without weights (masks, positions) has both an `S` and a `T` axis.

    Raises:
        RefusedError: something besides attention keeps a mask alive; the message names its node.
    """
    values = [
        node.outputs[0]
        for node in graph
        if node.domain in ("", "ai.onnx") and not depends_on_weights(node.outputs[0], set())
    ]
    if not values:
        return
    try:
        cut = cut_out(graph, [], values)
        context = MatchContext(graph, roles)
        results = run_cut(cut, ProbeInputs(context).feeds(cut, _SIZES, {}))
    except CutError as error:
        logger.info("masks left over could not be looked for: %s", error)
        return
    for value, result in zip(values, results, strict=True):
        if {_SIZES.length, _SIZES.total} <= set(result.shape):
            node = value.producer()
            raise RefusedError(
                f"something besides attention needs the mask {value.name} (node "
                f"{node.name if node else None}, {node.op_type if node else None}), which grows "
                "with the square of the prompt"
            )
