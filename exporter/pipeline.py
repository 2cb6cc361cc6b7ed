"""The export, start to end: load, normalize, find, choose, insert, lower, check, save, report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
from trianglemix.exporter.attention.foreign_operators import roles_of, state_layers
from trianglemix.exporter.attention.mask_probe import bound_note, bounded_context
from trianglemix.exporter.attention.sites import (
    MatchContext,
    Sites,
    anchors_of,
    check_understood,
    find_sites,
)
from trianglemix.exporter.configuration.config_check import ConfigCheck, check_config
from trianglemix.exporter.folder.fill_manifest import ExportedGraph, describe
from trianglemix.exporter.folder.genai_config import write_stop_tokens
from trianglemix.exporter.folder.output_folder import workplace
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.interface.cache_ports import find_ports, layer_caches
from trianglemix.exporter.interface.graph_interface import input_kinds
from trianglemix.exporter.layers.choice import LayerChoice, choose_layers, fingerprint
from trianglemix.exporter.normalize.steps import normalize
from trianglemix.exporter.onnx_file.model_file import load_model
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.registry import all_patterns, find_target
from trianglemix.exporter.report.build_report import build_report
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.exporter.rewrite.drop_unused import DropUnusedPass
from trianglemix.exporter.rewrite.insert_operator import InsertOperatorsPass
from trianglemix.exporter.rewrite.last_token import KeepLastLogitsPass
from trianglemix.exporter.rewrite.postconditions import (
    check_exported,
    check_no_square_left,
    interface_of,
)
from trianglemix.exporter.rewrite.shared_cache import FreeCacheLengthPass, can_share_cache
from trianglemix.exporter.sources.find_source import Source, find_source
from trianglemix.exporter.sources.model_config import read_context_length
from trianglemix.exporter.sources.prepare_source import WORK_FOLDER, prepare_source
from trianglemix.exporter.targets._target import Finished, Target, TargetExport
from trianglemix.exporter.verify.comparisons import check_passed


class Observer(Protocol):
    """Hears how the export goes on."""

    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Sites) -> None: ...


@dataclass(frozen=True)
class _Job:
    """What every stage may ask for."""

    options: ExportOptions
    target: Target
    folder: Path
    observer: Observer


@dataclass(frozen=True)
class _Found:
    """The source as read, and what shall become of it."""

    source: Source
    model: ir.Model
    roles: GraphRoles
    interface: tuple[list[str], list[str]]
    sites: Sites
    choice: LayerChoice
    config: ConfigCheck
    notes: tuple[str, ...]


def export(options: ExportOptions, observer: Observer) -> ExportReport:
    """Exports one model. With `dry_run` nothing is written.

    Raises:
        ExportError (RefusedError, PlanError): see each stage; nothing is left behind.
        ConfigurationError: a pattern parameter out of its range.
    """
    target = find_target(options.target)
    with workplace(options) as folder:
        job = _Job(options, target, folder, observer)
        found = _find(job)
        observer.stage("rewrite")
        graph = _rewrite(job, found)
        check_exported(graph.model, found.sites.found, found.interface)
        check_no_square_left(graph.model.graph, graph.roles)
        padding = target.left_padding
        manifest = describe(graph, found.choice, options, left_padding=padding)
        runs_as = target.runs_as(options)
        report = build_report(options, graph, found.sites, found.choice, manifest, runs_as)
        begun = target.begin(Finished(options, found.source, found.sites.found, graph, manifest))
        report = replace(
            report,
            warnings=(*found.source.warnings, *report.warnings, *found.config.warnings),
            notes=(*report.notes, *found.notes),
            prediction=begun.prediction,
        )
        if not options.dry_run:
            report = _write(job, found, begun, report)
    return report


def _find(job: _Job) -> _Found:
    """Load, normalize, find attention, choose layers."""
    observer = job.observer
    observer.stage("load")
    given = find_source(job.options.source)
    source = prepare_source(
        given, job.options, job.target.weights_dtype, job.folder, observer.stage
    )
    model = load_model(source.path)
    observer.stage("normalize")
    notes = [*normalize(model), *state_layers(model.graph)]
    roles = roles_of(model.graph, anchors_of(all_patterns()))
    interface = interface_of(model.graph)
    observer.stage("find attention")
    context = MatchContext(model.graph, roles, read_context_length(source.companions))
    sites = find_sites(context, all_patterns(), observer.progress)
    observer.sites(sites)
    check_understood(sites, context)
    config = check_config(model.graph, sites.found, source.companions)
    if config.companions != source.companions:  # it was another model's context that was probed
        context = MatchContext(model.graph, roles, read_context_length(config.companions))
        sites = find_sites(context, all_patterns(), observer.progress)
        check_understood(sites, context)
        source = replace(source, companions=config.companions)
    choice = choose_layers(
        job.options,
        sites.found,
        fingerprint(sites.found, roles),
        block_sparse=job.target.block_sparse,
    )
    notes += bound_note(config.context_length, sites.found)
    return _Found(source, model, roles, interface, sites, choice, config, tuple(notes))


def _rewrite(job: _Job, found: _Found) -> ExportedGraph:
    """Insert, keep the last logits, free the cache's length, lower."""
    model, roles, sites = found.model, found.roles, found.sites.found
    ports = find_ports(model.graph, sites)  # before anything is renamed
    kinds = input_kinds(model.graph, roles)
    caches = layer_caches(sites, ports)
    insert = InsertOperatorsPass(sites, roles, found.choice.rules)
    insert(model)
    last = KeepLastLogitsPass(roles, insert.row_end)
    if job.target.cuts_logits(job.options):
        last(model)
    FreeCacheLengthPass(roles)(model)
    for lower in job.target.passes(sites, dense=job.options.dense):
        lower(model)
    DropUnusedPass()(model)
    context_length = bounded_context(found.config.context_length, sites)
    return ExportedGraph(
        model,
        roles,
        len(sites),
        ports,
        caches,
        can_share_cache(model),
        context_length,
        kinds,
        last.tail_sizes,
    )


def _write(job: _Job, found: _Found, begun: TargetExport, report: ExportReport) -> ExportReport:
    """Save, verify, report; the manifest last, since it makes the folder an export."""
    options, folder, observer = job.options, job.folder, job.observer
    observer.stage("save")
    manifest, notes = begun.write(folder, observer.progress)
    notes += write_stop_tokens(found.source.companions, folder)
    copied = found.source.companions.copy(folder)
    report = replace(report, notes=(*found.source.notes, *report.notes, *notes, *copied))
    if options.verify:
        observer.stage("verify")
        checks, more = begun.verify(folder, manifest)
        check_passed(checks)
        report = replace(report, verification=tuple(checks), notes=(*report.notes, *more))
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    report.save(folder)
    manifest.save(folder)
    return report
