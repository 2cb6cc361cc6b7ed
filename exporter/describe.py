"""Fills the manifest of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
from trianglemix.custom_ops.manifest import LayerCache, Manifest
from trianglemix.exporter.graph_roles import GraphRoles
from trianglemix.exporter.head_trace import output_of, root_of
from trianglemix.exporter.layers import LayerChoice
from trianglemix.exporter.lengths import PROMPT_LENGTH, is_no_left_padding
from trianglemix.exporter.model_io import MODEL_FILE
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.sites import AttentionSite
from trianglemix.exporter.target import Target

_DTYPES: Final = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length")


@dataclass(frozen=True)
class ExportedGraph:
    """What the manifest needs to know besides the choice of layers."""

    model: ir.Model
    roles: GraphRoles
    caches: tuple[LayerCache, ...]
    shared_cache: bool
    context_length: int | None


def describe(graph: ExportedGraph, choice: LayerChoice, options: ExportOptions,
             target: Target) -> Manifest:  # fmt: skip
    """The manifest of a finished graph."""
    roles = graph.roles
    names = {value.name for value in graph.model.graph.inputs}
    return Manifest(
        target=target.name,
        model_file=MODEL_FILE,
        cache_dtype=_DTYPES[roles.dtype],
        input_ids=str(roles.input_ids.name),
        attention_mask=str(roles.attention_mask.name),
        position_ids=None if roles.position_ids is None else roles.position_ids.name,
        prompt_length=PROMPT_LENGTH if PROMPT_LENGTH in names else None,
        logits=str(roles.logits.name),
        last_token_logits=has_last_token_logits(roles),
        num_layers=len(graph.caches),
        triangle_layers=tuple(sorted(choice.layers)),
        pattern=choice.pattern,
        cache=graph.caches,
        shared_cache=graph.shared_cache,
        left_padding=takes_left_padding(graph.model, roles, target, dense=options.dense),
        context_length=graph.context_length,
    )


def has_last_token_logits(roles: GraphRoles) -> bool:
    """Whether the graph gives one row of logits per sequence."""
    shape = roles.logits.shape
    return shape is not None and len(shape) == 3 and shape[1] == 1


def takes_left_padding(model: ir.Model, roles: GraphRoles, target: Target, *, dense: bool) -> bool:
    """Whether every layer knows where a row begins, and positions come from outside."""
    unpadded = any(is_no_left_padding(value) for node in model.graph for value in node.outputs)
    return target.left_padding and not dense and not unpadded and roles.position_ids is not None


def layer_caches(sites: Sequence[AttentionSite]) -> tuple[LayerCache, ...]:
    """Graph names of each layer's cache, read before anything is renamed."""
    caches = []
    for site in sites:
        if site.past is None or site.present is None:
            continue
        past_key, past_value = (str(root_of(value).name) for value in site.past)
        present_key, present_value = (
            str((output_of(value) or value).name) for value in site.present
        )
        caches.append(
            LayerCache(
                layer=site.layer,
                past_key=past_key,
                past_value=past_value,
                present_key=present_key,
                present_value=present_value,
                kv_num_heads=site.shape.kv_num_heads,
                head_size=site.shape.head_size,
                value_head_size=site.shape.value_head_size,
            )
        )
    return tuple(caches)


def read_context_length(folder: Path) -> int | None:
    """Tokens that the model's config.json allows, if it is there and says so."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sections: list[Any] = [config, config.get("text_config")] if isinstance(config, dict) else []
    for section in sections:
        for key in _CONTEXT_KEYS if isinstance(section, dict) else ():
            length = section.get(key)
            if isinstance(length, int):
                return length
    return None
