"""Looks for what would still grow with the square of the prompt after the attentions are gone."""

from __future__ import annotations

import logging

import onnx_ir as ir
from trianglemix.exporter.attention.cutout import CutError, cut_out, depends_on_weights, run_cut
from trianglemix.exporter.attention.probe import CallSizes, ProbeInputs
from trianglemix.exporter.attention.sites import MatchContext
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.roles import GraphRoles

logger = logging.getLogger(__name__)

_SIZES = CallSizes(batch=1, length=67, past=30)  # no head count, head size or constant is 67 or 97


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
