"""Compares what a graph does with what its configuration says the model does.

An export is as its source graph. Where an exporter left something out, the source is not the
model, and who has the configuration beside it should hear so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.attention.sites import AttentionSite
from trianglemix.exporter.configuration.position_tables import table_length
from trianglemix.exporter.configuration.rotary_constants import (
    RotaryConstant,
    find_rotary_constants,
    holds,
    is_rotary,
    matches,
    table_magnitude,
)
from trianglemix.exporter.configuration.rotary_factors import Rotary, rotaries
from trianglemix.exporter.options import layer_ranges
from trianglemix.exporter.sources.companions import Companions
from trianglemix.exporter.sources.model_config import (
    LayerAttention,
    ModelConfig,
    read_context_length,
    read_model_config,
)

_LEAST_TABLE: Final = 64
"""Rows below which a table is hardly one of positions."""
_ELSEWHERE: Final = (
    "The exporter that made the source left this out: export the Hugging Face folder in its place"
)


@dataclass(frozen=True)
class ConfigCheck:
    """What the comparison found.

    `companions` are those that belong to the graph, `context_length` the tokens for which it is
    the model.
    """

    companions: Companions
    warnings: tuple[str, ...]
    context_length: int | None


def check_config(
    graph: ir.Graph, sites: Sequence[AttentionSite], companions: Companions
) -> ConfigCheck:
    """Compares a graph, whose attentions are `sites`, with the configuration that lies beside it.

    A configuration one folder up that describes another model is left alone, with all that lies
    there. The context ends where the graph's tables of positions do.
    """
    check = _compared(graph, sites, companions)
    end, says = table_length(graph), check.context_length
    if end is None or end < _LEAST_TABLE or (says is not None and says <= end):
        return check
    note = () if says is None else (
        f"the configuration says a context of {says} tokens, but the graph's tables of positions "
        f"end at {end} tokens: longer texts are refused",
    )  # fmt: skip
    return replace(check, warnings=(*check.warnings, *note), context_length=end)


def _compared(
    graph: ir.Graph, sites: Sequence[AttentionSite], companions: Companions
) -> ConfigCheck:
    notes: list[str] = []
    config = read_model_config(companions)
    strange = [] if config is None else _structure(config, sites)
    path = companions.find("config.json")
    if strange and path is not None and path.parent == companions.above:
        notes.append(f"{path} describes another model ({strange[0]}): nothing was taken from there")
        companions = companions.without_above()
        config = read_model_config(companions)
        strange = [] if config is None else _structure(config, sites)
    context = read_context_length(companions)
    if config is None:
        return ConfigCheck(companions, tuple(notes), context)
    notes += [f"{config.name} describes another model: {difference}" for difference in strange]
    if not strange:
        notes += _windows(config, sites, context)
        notes += _softcaps(config, sites)
        lines, context = _rotation(config, (graph, sites), context)
        notes += lines
    return ConfigCheck(companions, tuple(notes), context)


def _structure(config: ModelConfig, sites: Sequence[AttentionSite]) -> list[str]:
    """Sizes by which a configuration is another model's."""
    differences = []
    if config.num_layers not in (None, len(sites)) and not config.is_hybrid:
        differences.append(f"it has {config.num_layers} attention layers, the graph {len(sites)}")
    heads = {site.shape.num_heads for site in sites}
    shared = {site.shape.kv_num_heads for site in sites}
    sizes = {site.shape.head_size for site in sites}
    if config.num_heads is not None and config.num_heads not in heads:
        differences.append(f"it has {config.num_heads} heads, the graph {min(heads)}")
    if config.kv_num_heads not in (None, *shared) and shared != heads:  # they may be repeated
        differences.append(f"it has {config.kv_num_heads} key/value heads, the graph {min(shared)}")
    if config.head_size is not None and config.head_size not in sizes:
        differences.append(f"its heads are {config.head_size} wide, the graph's {min(sizes)}")
    return differences


def _windows(config: ModelConfig, sites: Sequence[AttentionSite], context: int | None) -> list[str]:
    """Layers whose rows see more, or less, than the configuration lets them."""
    groups: dict[tuple[LayerAttention, int | None], list[int]] = {}
    if config.layers is None:
        return _any_window(config, sites, context)
    if len(config.layers) != len(sites):
        return []
    for site, layer in zip(sites, config.layers, strict=True):
        bound = layer.window or layer.chunk
        unseen = bound is not None and context is not None and bound >= context
        same = layer.chunk is None and layer.window == site.mask.window
        if not same and not (unseen and site.mask.window is None):
            groups.setdefault((layer, site.mask.window), []).append(site.layer)
    return [
        _difference(config.name, layer, window, numbers)
        for (layer, window), numbers in groups.items()
    ]


def _difference(
    name: str, layer: LayerAttention, window: int | None, numbers: Sequence[int]
) -> str:
    says = "full attention"
    if layer.window is not None:
        says = f"a sliding window of {layer.window} tokens"
    elif layer.chunk is not None:
        says = f"attention within chunks of {layer.chunk} tokens"
    does = "attends causally" if window is None else f"slides a window of {window}"
    bounds = [one for one in (layer.window, layer.chunk, window) if one is not None]
    return (
        f"{name} says {says} in layers {layer_ranges(numbers, ', ')}, but the graph {does} there: "
        f"beyond {min(bounds)} tokens source and export differ from the model itself"
        + (f". {_ELSEWHERE}" if layer.chunk is None else "")
    )


def _any_window(
    config: ModelConfig, sites: Sequence[AttentionSite], context: int | None
) -> list[str]:
    """Of a family whose windowed layers are not known: whether none at all slides."""
    window = config.raw.get("sliding_window")
    slides = any(site.mask.window is not None for site in sites)
    if not isinstance(window, int) or slides or (context is not None and window >= context):
        return []
    return [
        f"{config.name} names a sliding window of {window} tokens, but no layer of the graph "
        f"slides one: beyond {window} tokens source and export may differ from the model itself"
    ]


def _softcaps(config: ModelConfig, sites: Sequence[AttentionSite]) -> list[str]:
    if config.softcap is None:
        return []
    other = [site.layer for site in sites if not np.isclose(site.softcap, config.softcap)]
    if not other:
        return []
    return [
        f"{config.name} caps attention scores at {config.softcap:g}, but the graph does not in "
        f"layers {layer_ranges(other, ', ')}: source and export differ from the model itself"
    ]


def _rotation(
    config: ModelConfig, found: tuple[ir.Graph, Sequence[AttentionSite]], context: int | None
) -> tuple[list[str], int | None]:
    """What the graph's rotary constants lack, and the context for which they hold."""
    graph, sites = found
    notes: list[str] = []
    kinds = rotaries(config.raw, config.head_size or sites[0].shape.head_size)
    for rotary in kinds:
        if rotary.is_plain and rotary.switch is None:
            continue
        constants = find_rotary_constants(graph, len(rotary.plain))
        note, limit = _one_rotation(config.name, rotary, constants)
        notes += [] if note is None else [note]
        context = min(context or limit, limit) if limit else context
    return [*notes, *_strangers(config.name, kinds, graph)], context


def _strangers(name: str, kinds: Sequence[Rotary], graph: ir.Graph) -> list[str]:
    """Rotary constants of none of the kinds that the configuration names."""
    known = [f for kind in kinds for f in (kind.plain, kind.scaled, kind.long) if f is not None]
    widths = {len(kind.plain) for kind in kinds}
    constants = [c for width in widths for c in find_rotary_constants(graph, width)]
    strange = [
        constant.name
        for constant in constants
        if is_rotary(constant)
        and not any(holds(constant, f) for f in known if len(f) == len(constant.rows[1]))
    ]
    if not strange:
        return []
    return [
        f"{strange[0]} holds other rotary frequencies than {name} names: source and export "
        "differ from the model itself"
    ]


def _one_rotation(
    name: str, rotary: Rotary, constants: Sequence[RotaryConstant]
) -> tuple[str | None, int | None]:
    """A note, and the tokens up to which the graph is the model where that is a limit."""
    scaled, plain = matches(constants, rotary.scaled), matches(constants, rotary.plain)
    if rotary.kind == "dynamic" and plain and rotary.switch:
        return (
            f"{name} scales rotary frequencies with the length (dynamic), which the graph holds "
            f"as a constant: it is the model up to {rotary.switch} tokens, and the context is "
            "bounded to them"
        ), rotary.switch
    if rotary.long is not None:
        long = matches(constants, rotary.long)
        if long and scaled:
            return None, None
        if scaled:
            return (
                f"{name} has rotary factors of their own for texts longer than {rotary.switch} "
                "tokens (longrope), but the graph holds the short ones only: the context is "
                f"bounded to {rotary.switch} tokens, up to which it is the model"
            ), rotary.switch
        if long:
            return (
                f"{name} has rotary factors of their own for texts up to {rotary.switch} tokens "
                "(longrope), but the graph holds the long ones only: for such texts source and "
                "export differ from the model itself"
            ), None
    if plain and not scaled and not rotary.is_plain:
        return (
            f"{name} scales rotary frequencies ({rotary.kind}), but the graph holds unscaled "
            f"ones: source and export differ from the model itself. {_ELSEWHERE}"
        ), None
    return _magnitude(name, rotary, scaled), None


def _magnitude(name: str, rotary: Rotary, tables: Sequence[RotaryConstant]) -> str | None:
    """Cosines that are not multiplied as the configuration wants it."""
    found = [table_magnitude(table) for table in tables]
    other = [one for one in found if one is not None and abs(one / rotary.magnitude - 1) > 2e-3]
    if not other:
        return None
    return (
        f"{name} multiplies rotary factors by {rotary.magnitude:.5g} ({rotary.kind}), but the "
        f"graph by {other[0]:.5g}: source and export differ from the model itself"
    )
