"""The export, start to end: load, normalize, find, choose, insert, lower, check, save, report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.check import check_exported, interface_of
from trianglemix.exporter.clean import DropUnusedPass
from trianglemix.exporter.cost import attention_cost, last_token_saving
from trianglemix.exporter.describe import (
    ExportedGraph,
    describe,
    layer_caches,
    read_context_length,
)
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.genai_folder import write_genai_config
from trianglemix.exporter.graph_roles import GraphRoles, find_roles
from trianglemix.exporter.insert import (
    ROW_END,
    InsertTriangleAttentionPass,
    is_triangle,
    is_triangle_attention,
    layer_of,
)
from trianglemix.exporter.last_token import KeepLastLogitsPass, find_head
from trianglemix.exporter.layers import LayerChoice, choose_layers
from trianglemix.exporter.leftovers import check_no_square_left
from trianglemix.exporter.model_io import (
    MODEL_FILE,
    Source,
    copy_companions,
    find_source,
    load_model,
    save_model,
)
from trianglemix.exporter.normalize import normalize
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.output_folder import output_folder
from trianglemix.exporter.plan import Fingerprint
from trianglemix.exporter.registry import all_patterns, all_targets
from trianglemix.exporter.report import ExportReport, layer_reports
from trianglemix.exporter.shared_cache import FreeCacheLengthPass, can_share_cache
from trianglemix.exporter.sites import MatchContext, Sites, check_understood, find_sites
from trianglemix.exporter.source import WORK_FOLDER, prepare_source
from trianglemix.exporter.target import Target
from trianglemix.exporter.verify import verify_export


class Observer(Protocol):
    """Hears how the export goes on."""

    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Sites) -> None: ...


def export(options: ExportOptions, observer: Observer) -> ExportReport:
    """Exports one model. With `dry_run` nothing is written.

    Raises:
        ExportError (RefusedError, PlanError): see each stage; nothing is left behind.
        ConfigurationError: a pattern parameter out of its range.
    """
    target = _find_target(options.target)
    with _workplace(options) as folder:
        observer.stage("load")
        source = prepare_source(find_source(options.source), target, folder, observer.stage)
        model = load_model(source.path)
        observer.stage("normalize")
        normalize(model)
        roles, interface = find_roles(model.graph), interface_of(model.graph)
        observer.stage("find attention")
        context = MatchContext(model.graph, roles)
        sites = find_sites(context, all_patterns(), observer.progress)
        observer.sites(sites)
        check_understood(sites, roles)
        choice = choose_layers(options, sites.found, _fingerprint(sites, roles))
        observer.stage("rewrite")
        caches = layer_caches(sites.found)
        _rewrite(model, roles, sites, choice, options, target)
        check_exported(model, sites.found, interface)
        check_no_square_left(model.graph, roles)
        graph = ExportedGraph(
            model, roles, caches, can_share_cache(model), read_context_length(source.companions)
        )
        manifest = describe(graph, choice, options, target)
        report = _report(options, graph, sites, choice, manifest)
        if target.offline is not None:
            runs_as = target.offline.runs_as
            report = replace(
                report,
                layers=tuple(replace(row, runs_as=runs_as[row.action]) for row in report.layers),
                prediction=target.offline.predict(model, manifest, options),
            )
        if options.dry_run:
            return report
        observer.stage("save")
        if target.offline is None:
            notes = _save(model, source, folder, options, observer)
        else:
            manifest, notes = target.offline.package(
                model, manifest, folder, options, observer.progress
            )
        copied = copy_companions(source.companions, folder)
        report = replace(report, notes=(*report.notes, *notes, _copied_note(copied)))
        if options.verify:
            observer.stage("verify")
            report = _verified(report, source.path, folder, (graph, manifest), options)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
        report.save(folder)
        manifest.save(folder)
    return report


def _find_target(name: str) -> Target:
    targets = all_targets()
    if name not in targets:
        raise ExportError(f"there is no target {name}; targets: {', '.join(sorted(targets))}")
    return targets[name]


@contextmanager
def _workplace(options: ExportOptions) -> Iterator[Path]:
    """The unfinished output folder; for a dry run a temporary one that goes away."""
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix="trianglemix-") as folder:
            yield Path(folder)
        return
    if options.output is None:
        raise ExportError("no output folder given; add -o FOLDER (or --dry-run)")
    source = options.source if options.source.is_dir() else options.source.parent
    if options.output.resolve() == source.resolve():
        raise ExportError(f"the output {options.output} is the source's own folder; give another")
    with output_folder(options.output, force=options.force) as folder:
        yield folder


def _fingerprint(sites: Sites, roles: GraphRoles) -> Fingerprint:
    head, shape = find_head(roles), sites.found[0].shape
    return Fingerprint(
        num_layers=len(sites.found),
        num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
        head_size=shape.head_size,
        hidden_size=head.hidden_size if head else None,
        vocabulary_size=head.vocabulary_size if head else None,
    )


def _rewrite(
    model: ir.Model,
    roles: GraphRoles,
    sites: Sites,
    choice: LayerChoice,
    options: ExportOptions,
    target: Target,
) -> None:
    """Insert, keep the last logits, free the cache's length, lower."""
    patterns = dict.fromkeys(choice.layers, choice.pattern)
    InsertTriangleAttentionPass(sites.found, roles, patterns)(model)
    if options.last_token_logits:
        KeepLastLogitsPass(roles, model.meta[ROW_END])(model)
    FreeCacheLengthPass(roles)(model)
    for lower in target.lower_dense_twin if options.dense else target.lower:
        lower()(model)
    DropUnusedPass()(model)


def _report(
    options: ExportOptions,
    graph: ExportedGraph,
    sites: Sites,
    choice: LayerChoice,
    manifest: Manifest,
) -> ExportReport:
    patterns = dict.fromkeys(choice.layers, choice.pattern)
    saving = None
    if manifest.last_token_logits:
        itemsize = graph.roles.logits.dtype.itemsize if graph.roles.logits.dtype else 4
        saving = last_token_saving(find_head(graph.roles), options.prompt_length, int(itemsize))
    notes = []
    if choice.skipped:
        notes.append(f"layers {list(choice.skipped)} slide a window of their own and stay so")
    if not graph.shared_cache:
        notes.append("past and present cannot share one buffer: something else reads the past")
    return ExportReport(
        source=str(options.source),
        target=options.target,
        opset=graph.model.graph.opset_imports[""],
        ir_version=graph.model.ir_version,
        pattern=choice.pattern if choice.layers else None,
        layer_choice=choice.origin,
        layers=layer_reports(sites.found, choice, _runs_as(graph.model, choice)),
        cost=attention_cost(sites.found, patterns, options.prompt_length),
        last_token=saving,
        shared_cache=graph.shared_cache,
        left_padding=manifest.left_padding,
        notes=tuple(notes),
        warnings=(choice.warning,) if choice.warning else (),
    )


def _runs_as(model: ir.Model, choice: LayerChoice) -> dict[int, str]:
    """The operator that each layer's attention became, found by the name that it was given."""
    operators: dict[int, str] = {}
    for node in model.graph:
        layer = layer_of(node)
        if layer is None:
            continue
        dense = is_triangle_attention(node) and not is_triangle(node)
        operators[layer] = node.op_type + (" (dense mode)" if dense else "")
    return operators


def _verified(
    report: ExportReport,
    source: Path,
    folder: Path,
    exported: tuple[ExportedGraph, Manifest],
    options: ExportOptions,
) -> ExportReport:
    """Raises ExportError where a comparison fails: the export is then not kept."""
    graph, manifest = exported
    head = find_head(graph.roles)
    vocabulary = (head.vocabulary_size if head else None) or 2
    checks, notes = verify_export(source, folder, manifest, vocabulary, options.atol)
    for check in checks:
        if not check.passed:
            raise ExportError(
                f"verification failed: {check.name} ({check.tokens} tokens) is off by "
                f"{check.max_error:.2e}, allowed {check.tolerance:.2e}; nothing was written"
            )
    return replace(report, verification=tuple(checks), notes=(*report.notes, *notes))


def _save(
    model: ir.Model, source: Source, folder: Path, options: ExportOptions, observer: Observer
) -> list[str]:
    """The model's files, and genai's configuration where the source has one."""
    notes = save_model(model, source.path.parent, folder, options.weights, observer.progress)
    library = any(is_triangle_attention(node) for node in model.graph)
    notes += write_genai_config(source.companions, folder, MODEL_FILE, needs_library=library)
    return notes


def _copied_note(names: Sequence[str]) -> str:
    return f"copied along: {', '.join(names)}" if names else "no config or tokenizer to copy along"
