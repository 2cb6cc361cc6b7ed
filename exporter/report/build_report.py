"""Builds the report of an export from what was found and what became of it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from trianglemix.exporter.attention.sites import AttentionSite, Sites
from trianglemix.exporter.folder.fill_manifest import ExportedGraph
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole, is_attention
from trianglemix.exporter.interface.language_model_head import find_head
from trianglemix.exporter.layers.choice import LayerChoice
from trianglemix.exporter.options import ExportOptions, layer_ranges
from trianglemix.exporter.report.export_report import ExportReport, LayerReport
from trianglemix.exporter.report.predicted_savings import attention_cost, last_token_saving
from trianglemix.manifest.manifest import RUNS, Manifest


def build_report(
    options: ExportOptions,
    graph: ExportedGraph,
    sites: Sites,
    choice: LayerChoice,
    manifest: Manifest,
    runs_as: Mapping[str, str],
) -> ExportReport:
    """The report as it is before anything is written; notes of the later stages are added to it.

    `runs_as` says what becomes of an action where the nodes themselves do not tell.
    """
    tokens = options.predicted_tokens(manifest.context_length)
    cost = attention_cost(sites.found, choice, tokens)
    saving = None
    if manifest.last_token_logits:
        itemsize = graph.roles.logits.dtype.itemsize if graph.roles.logits.dtype else 4
        head = find_head(graph.roles)
        saving = last_token_saving(head, graph.tail_sizes, tokens, int(itemsize))
    notes = [*choice.blocks.notes]
    if choice.skipped:
        notes.append(f"layers {list(choice.skipped)} slide a window of their own and stay so")
    if cost.not_predicted:
        notes.append(
            f"what block-sparse layers {layer_ranges(cost.not_predicted, ', ')} gain is not "
            "predicted: no plan says what they keep under this rule, so they count as dense"
        )
    notes += _interface_notes(manifest)
    if manifest.has_cache and not graph.shared_cache:
        notes.append("past and present cannot share one buffer: something else reads the past")
    return ExportReport(
        source=str(options.source),
        target=options.target,
        opset=graph.model.graph.opset_imports[""],
        ir_version=graph.model.ir_version,
        pattern=choice.pattern if choice.layers else None,
        block_rule=choice.blocks.rule if choice.blocks.layers else None,
        block_choice=choice.blocks.origin,
        layer_choice=choice.origin,
        layers=_layer_reports(sites.found, choice, runs_as, _operators(graph.model)),
        cost=cost,
        last_token=saving,
        shared_cache=graph.shared_cache,
        left_padding=manifest.left_padding,
        notes=tuple(notes),
        warnings=(
            *((choice.warning,) if choice.warning else ()),
            *_runtime_warnings(manifest),
            *_length_warnings(tokens, manifest.context_length),
        ),
    )


def _layer_reports(
    sites: tuple[AttentionSite, ...],
    choice: LayerChoice,
    runs_as: Mapping[str, str],
    operators: Mapping[int, str],
) -> tuple[LayerReport, ...]:
    """A row per layer, with what it ended up as: by its action, or else by its operator."""
    return tuple(
        _layer_report(site, *action, runs_as.get(action[0], operators.get(site.layer, "")))
        for site in sites
        for action in [_action(site, choice)]
    )


def _layer_report(site: AttentionSite, action: str, reason: str, runs_as: str) -> LayerReport:
    return LayerReport(
        layer=site.layer,
        node=site.anchor.name or site.anchor.outputs[0].name or "",
        form=site.form,
        num_heads=site.shape.num_heads,
        kv_num_heads=site.shape.kv_num_heads,
        head_size=site.shape.head_size,
        value_head_size=site.shape.value_head_size,
        scale=site.scale,
        softcap=site.softcap,
        mask=str(site.mask),
        action=action,
        runs_as=runs_as,
        reason=reason,
    )


def _action(site: AttentionSite, choice: LayerChoice) -> tuple[str, str]:
    role = choice.role(site)
    chosen = "chosen, but " if site.layer in choice.skipped else ""
    reasons = {
        LayerRole.TRIANGLE: choice.origin,
        LayerRole.BLOCK_SPARSE: choice.blocks.origin,
        LayerRole.WINDOWED: f"{chosen}the source slides a window here; kept exactly",
        LayerRole.DENSE: "not among the triangle layers",
    }
    return role.value, reasons[role]


def _runtime_warnings(manifest: Manifest) -> tuple[str, ...]:
    if manifest.runtime == RUNS:
        return ()
    return (
        f"trianglemix-run cannot run this export: {manifest.runtime}; plain ONNX Runtime can, with "
        "the native library (docs/running.md)",
    )


def _length_warnings(tokens: int, context: int | None) -> tuple[str, ...]:
    if context is None or tokens <= context:
        return ()
    return (f"the prediction is for {tokens} tokens, but the model's context is {context}",)


def _interface_notes(manifest: Manifest) -> list[str]:
    """What the graph's interface asks of whoever runs it."""
    notes = []
    if manifest.batch == 1:
        notes.append("the batch is fixed at 1: rows run in turn")
    if not manifest.has_cache:
        notes.append(
            "the source has no KV cache: every new token reads the whole text again, of at most "
            f"{manifest.context_length} tokens"
        )
    if not manifest.chunked_prefill:
        notes.append("a prompt cannot come in chunks: a state might not be carried from one on")
    for number in manifest.length_switches:
        notes.append(
            f"the model computes otherwise beyond {number} tokens (as a rotation chosen by the "
            "length does): a longer prompt must be read at once, or in chunks longer than that"
        )
    return notes


def _operators(model: ir.Model) -> dict[int, str]:
    """The operator that each layer's attention became; graph order is layer order."""
    attentions = [
        node for node in model.graph if is_attention(node) or node.op_type == "GroupQueryAttention"
    ]
    return {layer: _name(node) for layer, node in enumerate(attentions)}


def _name(node: ir.Node) -> str:
    if not is_attention(node):
        return node.op_type
    attention = AttentionNode(node)
    if attention.role is LayerRole.WINDOWED:
        return f"{node.op_type} (window {attention.pattern.sliding_window_size})"
    return node.op_type + (" (dense mode)" if attention.role is LayerRole.DENSE else "")
