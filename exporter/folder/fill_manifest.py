"""Fills the manifest of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.interface.cache_ports import CachePort
from trianglemix.exporter.interface.graph_interface import GraphInterface, read_interface
from trianglemix.exporter.interface.length_switch import length_switches
from trianglemix.exporter.interface.runtime_fit import RECOMPUTE_LIMIT, takes_chunks, why_not_run
from trianglemix.exporter.layers.choice import LayerChoice
from trianglemix.exporter.onnx_file.model_file import MODEL_FILE
from trianglemix.exporter.options import ExportOptions
from trianglemix.manifest.interface import GraphInput, has_cache, with_role
from trianglemix.manifest.manifest import RUNS, LayerCache, Manifest

_DTYPES: Final = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class ExportedGraph:
    """What the manifest needs to know besides the choice of layers.

    `kinds`: what each input of the source was there.
    """

    model: ir.Model
    roles: GraphRoles
    num_layers: int
    ports: tuple[CachePort, ...]
    caches: tuple[LayerCache, ...]
    shared_cache: bool
    context_length: int | None
    kinds: Mapping[str, GraphInput]
    tail_sizes: int  # of weights that see one row instead of all, the head's left aside


def describe(
    graph: ExportedGraph, choice: LayerChoice, options: ExportOptions, *, left_padding: bool
) -> Manifest:
    """The manifest of a finished graph; `left_padding`: whether the target takes it at all."""
    roles = graph.roles
    interface = read_interface(graph.model.graph, roles, graph.ports, graph.kinds)
    names = {value.role: value.name for value in interface.inputs}
    obstacle = why_not_run(interface)
    padding = left_padding and not options.dense and takes_left_padding(graph.model, interface)
    return Manifest(
        target=options.target,
        model_file=MODEL_FILE,
        cache_dtype=_DTYPES[roles.dtype],
        input_ids=str(roles.input_ids.name),
        attention_mask=str(roles.attention_mask.name),
        position_ids=names.get("position_ids"),
        prompt_length=names.get("prompt_length"),
        logits=str(roles.logits.name),
        last_token_logits=has_last_token_logits(roles),
        num_layers=graph.num_layers,
        triangle_layers=tuple(sorted(choice.layers)),
        pattern=choice.pattern,
        block_sparse_layers=tuple(sorted(choice.blocks.layers)),
        block_rule=choice.blocks.rule if choice.blocks.layers else None,
        cache=graph.caches,
        shared_cache=graph.shared_cache,
        left_padding=padding,
        context_length=_context_length(graph, interface),
        inputs=interface.inputs,
        outputs=interface.outputs,
        chunked_prefill=takes_chunks(graph.model.graph, interface.inputs),
        length_switches=length_switches(graph.model.graph),
        runtime=RUNS if obstacle is None else obstacle,
    )


def _context_length(graph: ExportedGraph, interface: GraphInterface) -> int | None:
    """The least of what the configuration says, what caches keep, and what recomputing bears."""
    limits = [graph.context_length, *(port.limit for port in graph.ports)]
    if not has_cache(interface.inputs):
        limits.append(RECOMPUTE_LIMIT)
    return min((limit for limit in limits if limit is not None), default=None)


def has_last_token_logits(roles: GraphRoles) -> bool:
    """Whether the graph gives one row of logits per sequence."""
    shape = roles.logits.shape
    return shape is not None and len(shape) == 3 and shape[1] == 1


def takes_left_padding(model: ir.Model, interface: GraphInterface) -> bool:
    """Whether every layer knows where a row begins, and positions come from outside, row by row.

    States would take the pads in, and lengths that are counted outside do not tell them.
    """
    inputs = interface.inputs
    unpadded = any(node.no_left_padding for node in AttentionNode.all_of(model.graph))
    by_row = any(x.batch_axis is not None for x in with_role(inputs, "position_ids"))
    strange = with_role(inputs, "state", "seqlens_k", "past_length")
    return not unpadded and by_row and not strange
