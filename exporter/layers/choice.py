"""Chooses which role each layer has, and says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.attention.sites import AttentionSite
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import LayerRole, Rule
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.interface.language_model_head import find_head
from trianglemix.exporter.layers.block_choice import (
    BlockChoice,
    Taken,
    choose_blocks,
    keep_dense,
)
from trianglemix.exporter.layers.plan import Fingerprint, Plan, find_shipped_plan
from trianglemix.exporter.options import ExportOptions, LayerRequest

_DEFAULT_SHARE: Final = 4  # the deepest quarter


@dataclass(frozen=True)
class LayerChoice:
    """The triangle layers, their pattern, where the choice comes from, and what to warn of.

    `blocks` are the block-sparse layers. Every question about a layer's role goes to `role`.
    """

    layers: frozenset[int]
    pattern: TrianglePattern
    origin: str
    warning: str | None = None
    skipped: tuple[int, ...] = ()
    blocks: BlockChoice = field(default_factory=BlockChoice)

    def role(self, site: AttentionSite) -> LayerRole:
        """What the layer of a site becomes."""
        if site.layer in self.layers:
            return LayerRole.TRIANGLE
        if site.layer in self.blocks.layers:
            return LayerRole.BLOCK_SPARSE
        return LayerRole.DENSE if site.mask.window is None else LayerRole.WINDOWED

    @property
    def rules(self) -> Mapping[int, Rule]:
        """By layer what it keeps, of the layers that do not keep all that their source does."""
        triangle: dict[int, Rule] = dict.fromkeys(self.layers, self.pattern)
        return triangle | dict.fromkeys(self.blocks.layers, self.blocks.rule)


def fingerprint(sites: Sequence[AttentionSite], roles: GraphRoles) -> Fingerprint:
    """What a plan is compared with."""
    head, shape = find_head(roles), sites[0].shape
    return Fingerprint(
        num_layers=len(sites),
        num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
        head_size=shape.head_size,
        hidden_size=head.hidden_size if head else None,
        vocabulary_size=head.vocabulary_size if head else None,
    )


def choose_layers(
    options: ExportOptions,
    sites: Sequence[AttentionSite],
    model: Fingerprint,
    *,
    block_sparse: bool = True,
) -> LayerChoice:
    """The layers' roles in an export; none is triangle or block-sparse with `--dense`.

    `block_sparse`: whether the target has that operator; without it those layers stay dense.

    Raises:
        ExportError: a layer that the model has not, a named layer that slides a window of its
            own or is wanted for both, no triangle layer at all.
        PlanError: the plan is for another model.
    """
    if options.dense:
        return LayerChoice(frozenset(), TrianglePattern(), "--dense: the dense twin")
    plan = _plan(options.layers, model)
    base = plan.pattern if plan and plan.pattern else TrianglePattern()
    pattern = options.pattern.over(base)
    windowed = {site.layer for site in sites if site.mask.window is not None}
    choice = _choose(options.layers, plan, len(sites), windowed)
    kept = frozenset(choice.layers - windowed)
    skipped = tuple(sorted(choice.layers & windowed))
    section = plan.block_sparse if plan is not None else None
    blocks = choose_blocks(options.blocks, section, Taken(len(sites), kept, windowed))
    if not block_sparse:
        blocks = keep_dense(blocks, options.target)
    if not kept and not (options.layers.none_wanted and blocks.layers):
        raise ExportError(
            "no layer would become a triangle layer"
            + (" (all chosen ones slide a window of their own)" if skipped else "")
            + "; choose layers, or ask for the dense twin with --dense"
        )
    return LayerChoice(kept, pattern, choice.origin, choice.warning, skipped, blocks)


@dataclass(frozen=True)
class _Choice:
    layers: frozenset[int]
    origin: str
    warning: str | None = None


def _plan(request: LayerRequest, model: Fingerprint) -> Plan | None:
    """The plan that takes part: a given one, else a shipped one where it can help."""
    if request.plan is not None:
        plan = Plan.load(request.plan)
        plan.check_fits(model)
        return plan
    if request.start_layer is not None or request.layers is not None:
        return None
    return find_shipped_plan(model)


def _choose(request: LayerRequest, plan: Plan | None, count: int, windowed: set[int]) -> _Choice:
    if request.layers is not None:
        return _named(request.layers, count, windowed)
    if request.start_layer is not None:
        return _from_start(request.start_layer, count)
    if request.count is not None:
        return _counted(request.count, plan, count, windowed)
    if plan is not None:
        return _Choice(plan.chosen_layers, _plan_origin(request, plan), _plan_warning(plan))
    usable = [layer for layer in range(count) if layer not in windowed] or list(range(count))
    deepest = max(1, len(usable) // _DEFAULT_SHARE)
    return _Choice(
        frozenset(usable[-deepest:]),
        f"default: the deepest quarter ({deepest} of {len(usable)} layers that can be chosen)",
        "no plan fits this model, so the deepest quarter of its layers was taken; which layers "
        "can be triangle layers is a property of the model: trianglemix-analyze finds out",
    )


def _plan_origin(request: LayerRequest, plan: Plan) -> str:
    given = f"plan {request.plan}" if request.plan else "shipped plan"
    return f"{given} for {plan.name}" + (f" ({plan.origin})" if plan.origin else "")


def _plan_warning(plan: Plan) -> str | None:
    """A plan that says of itself that nobody measured it is used, and said so."""
    if plan.figures.get("measured") is not False:
        return None
    return (
        f"nobody has measured what the plan for {plan.name} costs in accuracy: try it with "
        "trianglemix-eval, or make your own plan with trianglemix-analyze"
    )


def _named(layers: tuple[int, ...], count: int, windowed: set[int]) -> _Choice:
    for layer in layers:
        if layer >= count:
            raise ExportError(
                f"--layers names layer {layer}, but the model has {count} layers (0-{count - 1})"
            )
        if layer in windowed:
            raise ExportError(
                f"--layers names layer {layer}, which slides a window of its own; such a layer "
                "stays as it is: leave it out"
            )
    return _Choice(frozenset(layers), "--layers" if layers else "--layers none")


def _from_start(start: int, count: int) -> _Choice:
    if not 0 <= start < count:
        raise ExportError(
            f"--start-layer is {start}, but the model has {count} layers (0-{count - 1})"
        )
    return _Choice(frozenset(range(start, count)), f"--start-layer {start}")


def _counted(wanted: int, plan: Plan | None, count: int, windowed: set[int]) -> _Choice:
    if not 1 <= wanted <= count:
        raise ExportError(
            f"--num-triangle-layers is {wanted}, but the model has {count} layers; "
            f"give 1 to {count}"
        )
    if plan is not None and plan.layers_by_importance:
        order: Sequence[int] = plan.layers_by_importance
        origin = f"the {wanted} least important layers by the plan for {plan.name}"
    else:
        order = range(count - 1, -1, -1)
        origin = f"the {wanted} deepest layers"
    usable = [layer for layer in order if layer not in windowed]
    if len(usable) < wanted:
        own = [layer for layer in order if layer in windowed]
        why = f": {len(own)} of {count} slide a window of their own already" if own else ""
        raise ExportError(
            f"--num-triangle-layers is {wanted}, but only {len(usable)} layers can be chosen "
            f"from{why}"
        )
    return _Choice(frozenset(usable[:wanted]), origin)
