"""`--inspect`: what a model holds, as the exporter reads it; nothing is changed or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from rich.console import Console
from rich.table import Table
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.find_source import find_source
from trianglemix.exporter.graph_roles import GraphRoles, find_roles
from trianglemix.exporter.insert import is_triangle_attention
from trianglemix.exporter.model_io import external_tensors, load_model
from trianglemix.exporter.normalize import normalize
from trianglemix.exporter.registry import all_patterns
from trianglemix.exporter.report import print_near_misses
from trianglemix.exporter.sites import (
    AttentionSite,
    MatchContext,
    Sites,
    check_understood,
    find_sites,
)
from trianglemix.exporter.source_limit import pattern_of


@dataclass(frozen=True)
class Inspection:
    """What was found; `obstacle` is why an export would be refused, None if it would not be."""

    path: Path
    producer: str
    opset: int
    ir_version: int
    num_nodes: int
    external_bytes: int
    roles: GraphRoles
    sites: Sites
    obstacle: str | None


def inspect_model(source: Path) -> Inspection:
    """Reads an ONNX model and measures its attentions, as an export does.

    Raises:
        ExportError: no ONNX model there, or one that cannot be read at all.
    """
    found = find_source(source)
    if found.is_huggingface:
        raise ExportError(
            f"{source} is a Hugging Face folder: there is no graph to inspect before it is "
            "exported; leave --inspect out"
        )
    model = load_model(found.path)
    external = sum(tensor.nbytes for tensor in external_tensors(model))
    normalize(model)
    roles = find_roles(model.graph)
    context = MatchContext(model.graph, roles)
    sites = find_sites(context, all_patterns())
    return Inspection(
        path=found.path,
        producer=" ".join(x for x in (model.producer_name, model.producer_version) if x),
        opset=model.graph.opset_imports[""],
        ir_version=model.ir_version,
        num_nodes=len(list(model.graph)),
        external_bytes=external,
        roles=roles,
        sites=sites,
        obstacle=_obstacle(sites, context),
    )


def print_inspection(inspection: Inspection, console: Console) -> None:
    """The model, its inputs by role, a row per attention, and what was not understood."""
    console.print(
        f"{inspection.path}: opset {inspection.opset}, IR {inspection.ir_version}, "
        f"{inspection.num_nodes} nodes, {inspection.external_bytes / 1e9:.2f} GB beside it"
        + (f", written by {inspection.producer}" if inspection.producer else ""),
        highlight=False,
        markup=False,
    )
    for line in _role_lines(inspection.roles):
        console.print(line, highlight=False, markup=False)
    table = Table()
    for name in ("layer", "found as", "heads", "head size", "scale", "mask", "cache", "node"):
        table.add_column(name)
    for site in inspection.sites.found:
        table.add_row(*_cells(site))
    console.print(table)
    print_near_misses(inspection.sites.near_misses, console)
    verdict = inspection.obstacle
    console.print(
        "can be exported" if verdict is None else f"would be refused: {verdict}",
        highlight=False,
        markup=False,
    )


def _obstacle(sites: Sites, context: MatchContext) -> str | None:
    try:
        check_understood(sites, context)
    except RefusedError as error:
        return str(error)
    return None


def _role_lines(roles: GraphRoles) -> list[str]:
    named: dict[str, ir.Value | None] = {
        "tokens": roles.input_ids,
        "attention mask": roles.attention_mask,
        "positions": roles.position_ids,
        "logits": roles.logits,
    }
    lines = [
        f"{role}: {value.name} {value.shape}" if value is not None else f"{role}: none"
        for role, value in named.items()
    ]
    first = roles.caches[0] if roles.caches else None
    more = "" if first is None else f": {first.name} {first.shape} {first.dtype} and so on"
    return [*lines, f"caches: {len(roles.caches)}{more}"]


def _cells(site: AttentionSite) -> tuple[str, ...]:
    shape = site.shape
    size = str(shape.head_size)
    if shape.value_head_size != shape.head_size:
        size += f"/{shape.value_head_size}"
    cap = f" cap {site.softcap:g}" if site.softcap else ""
    return (
        str(site.layer),
        site.form,
        f"{shape.num_heads}/{shape.kv_num_heads}",
        size,
        f"{site.scale:.5g}{cap}",
        _mask(site),
        str(site.past[0].name) if site.past else "none",
        site.anchor.name or str(site.anchor.outputs[0].name),
    )


def _mask(site: AttentionSite) -> str:
    """A triangle layer of an earlier export by its pattern: sinks, window, last rows.

    To an export it is a causal layer, since its layers are chosen anew.
    """
    if site.mask.window is not None or not is_triangle_attention(site.anchor):
        return str(site.mask)
    own = pattern_of(site.anchor)
    return (
        str(site.mask)
        if own.is_dense
        else "triangle " + "/".join(map(str, own.as_attributes().values()))
    )
