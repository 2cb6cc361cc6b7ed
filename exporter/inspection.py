"""`--inspect`: what a model holds, as the exporter reads it; nothing is changed or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trianglemix.exporter.attention.foreign_operators import roles_of
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    MatchContext,
    Sites,
    anchors_of,
    check_understood,
    find_sites,
)
from trianglemix.exporter.configuration.config_check import check_config
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole, is_attention
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.interface.cache_ports import find_ports
from trianglemix.exporter.interface.graph_interface import GraphInterface, read_interface
from trianglemix.exporter.interface.runtime_fit import why_not_run
from trianglemix.exporter.normalize.steps import normalize
from trianglemix.exporter.onnx_file.model_file import external_tensors, load_model
from trianglemix.exporter.registry import all_patterns
from trianglemix.exporter.report.print_report import print_near_misses
from trianglemix.exporter.sources.find_source import find_source
from trianglemix.exporter.sources.model_config import read_context_length
from trianglemix.manifest.interface import GraphInput, Shape


@dataclass(frozen=True)
class Inspection:
    """What was found; `obstacle` is why an export would be refused, None if it would not be.

    `warnings` tell where the graph is not what its configuration says.
    """

    path: Path
    producer: str
    opset: int
    ir_version: int
    num_nodes: int
    external_bytes: int
    roles: GraphRoles
    sites: Sites
    interface: GraphInterface
    obstacle: str | None
    warnings: tuple[str, ...]


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
    roles = roles_of(model.graph, anchors_of(all_patterns()))
    context = MatchContext(model.graph, roles, read_context_length(found.companions))
    sites = find_sites(context, all_patterns())
    obstacle = _obstacle(sites, context)
    config = None if obstacle else check_config(model.graph, sites.found, found.companions)
    return Inspection(
        path=found.path,
        producer=" ".join(x for x in (model.producer_name, model.producer_version) if x),
        opset=model.graph.opset_imports[""],
        ir_version=model.ir_version,
        num_nodes=len(list(model.graph)),
        external_bytes=external,
        roles=roles,
        sites=sites,
        interface=read_interface(model.graph, roles, find_ports(model.graph, sites.found)),
        obstacle=obstacle,
        warnings=() if config is None else config.warnings,
    )


def print_inspection(inspection: Inspection, console: Console, *, quiet: bool = False) -> None:
    """The model, its interface, a row per attention, and what was not understood.

    `quiet` leaves the file, the number of attentions and the verdicts.
    """

    def line(text: str) -> None:
        console.print(text)

    forms = ", ".join(dict.fromkeys(site.form for site in inspection.sites.found))
    if quiet:
        found = len(inspection.sites.found)
        line(f"{inspection.path}: {found} attentions" + (f" ({forms})" if forms else ""))
    else:
        line(
            f"{inspection.path}: opset {inspection.opset}, IR {inspection.ir_version}, "
            f"{inspection.num_nodes} nodes, {inspection.external_bytes / 1e9:.2f} GB beside it"
            + (f", written by {inspection.producer}" if inspection.producer else "")
        )
        console.print(_interface_table(inspection.interface))
        console.print(_attention_table(inspection.sites))
        print_near_misses(inspection.sites.near_misses, console)
    verdict = inspection.obstacle
    line("can be exported" if verdict is None else f"would be refused: {verdict}")
    for warning in inspection.warnings:
        line(f"warning: {warning}")
    reason = why_not_run(inspection.interface)
    if reason is not None:
        line(f"trianglemix-run could not run the export: {reason}")


def _interface_table(interface: GraphInterface) -> Table:
    """A row per input and output; those of many layers that are alike share one."""
    table = Table("", "name", "is for", "type", "shape", "from")
    rows: dict[tuple[str, ...], list[str]] = {}
    for value in interface.inputs:
        key = ("input", value.role, value.dtype, _shape(value.shape), _origin(value))
        rows.setdefault(key, []).append(value.name)
    for output in interface.outputs:
        made = ("output", output.role, output.dtype, _shape(output.shape), "")
        rows.setdefault(made, []).append(output.name)
    for (side, role, dtype, shape, origin), names in rows.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        cells = (side, names[0] + more, role.replace("_", " "), dtype, shape, origin)
        table.add_row(*cells)
    return table


def _origin(value: GraphInput) -> str:
    """Where a call's value comes from, in words that are alike for layers that are alike."""
    if not value.is_carried:
        return {"optional": "its default", "unknown": "its user"}.get(value.role, "tokens")
    if value.carried_from is None:
        return "nothing"
    kind = "new tokens" if value.appends else "output"
    return f"{kind}, axes {list(value.permutation)}" if value.permutation else kind


def _shape(shape: Shape | None) -> str:
    if shape is None:
        return "?"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _attention_table(sites: Sites) -> Table:
    table = Table("layer", "found as", "heads", "head size", "scale", "mask", "cache", "node")
    for site in sites.found:
        table.add_row(*_cells(site))
    return table


def _obstacle(sites: Sites, context: MatchContext) -> str | None:
    try:
        check_understood(sites, context)
    except RefusedError as error:
        return str(error)
    return None


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
    """A layer of an earlier export by its rule: sinks, window and last rows, or its mass.

    To an export it is a causal layer, since the layers' roles are chosen anew.
    """
    if site.mask.window is not None or not is_attention(site.anchor):
        return str(site.mask)
    own = AttentionNode(site.anchor)
    if own.rule.is_dense:
        return str(site.mask)
    numbers = [f"{number:g}" for number in own.rule.as_attributes().values()]
    shown = numbers[:1] if own.role is LayerRole.BLOCK_SPARSE else numbers
    return f"{own.role.value} {'/'.join(shown)}"
