"""Chooses which of the layers that are no triangle layers become block-sparse, and says why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from trianglemix.custom_ops.block_sparse.contract import SAMPLE_STEP, BlockRule
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.options import BlockRequest, layer_ranges

SCORES_SHARE: Final = 1 / (2 * SAMPLE_STEP)
"""Of dense attention: the exact scores of every 16th row, without the product with the values."""


@dataclass(frozen=True)
class BlockChoice:
    """The block-sparse layers, their rule, where the choice comes from, and what to tell.

    `measured` is the plan's section where it was measured under this very rule.
    """

    layers: frozenset[int] = frozenset()
    rule: BlockRule = field(default_factory=BlockRule)
    origin: str = ""
    notes: tuple[str, ...] = ()
    measured: BlockSparsePlan | None = None

    def share(self, layer: int, tokens: int) -> float | None:
        """What a layer costs of dense attention over a prompt; None where nobody measured it."""
        if self.rule.is_dense or tokens <= self.rule.min_length:
            return 1.0
        density = None if self.measured is None else self.measured.density(layer, tokens)
        return None if density is None else density + SCORES_SHARE


@dataclass(frozen=True)
class Taken:
    """Layers that have another role already."""

    count: int  # of all layers
    triangle: Collection[int]
    windowed: Collection[int]


def choose_blocks(request: BlockRequest, plan: BlockSparsePlan | None, taken: Taken) -> BlockChoice:
    """The user's layers, or else those of the section of the plan that the export uses.

    Raises:
        ExportError: a layer that the model has not or that has another role, or a rule asked for
            without a layer that follows it.
        ConfigurationError: the rule is out of its range.
    """
    if request.layers is not None:
        _check_named(request.layers, taken)
    layers = frozenset(
        request.layers if request.layers is not None else plan.layers if plan else ()
    )
    others = layers & {*taken.triangle, *taken.windowed}
    rule = request.over(plan.rule if plan else BlockRule())
    chosen = layers - others
    if not chosen:
        if request.changes_rule:
            raise ExportError(
                "--mass and --min-length are of block-sparse layers, of which there are none; "
                "name some with --block-sparse-layers, or give a plan that does"
            )
        return BlockChoice(notes=_notes(others))
    origin = "--block-sparse-layers"
    if request.layers is None and plan is not None:
        origin = "the plan's section" + (f" ({plan.origin})" if plan.origin else "")
    measured = plan if plan is not None and plan.rule == rule else None
    return BlockChoice(chosen, rule, origin, _notes(others), measured)


def keep_dense(choice: BlockChoice, target: str) -> BlockChoice:
    """The same for a device that has no such operator: nothing but a note is left."""
    if not choice.layers:
        return choice
    note = (
        f"{target} has no block-sparse attention: layers {layer_ranges(choice.layers, ', ')} "
        "stay dense"
    )
    return BlockChoice(notes=(*choice.notes, note))


def _check_named(layers: Collection[int], taken: Taken) -> None:
    for layer in layers:
        if layer >= taken.count:
            raise ExportError(
                f"--block-sparse-layers names layer {layer}, but the model has {taken.count} "
                f"layers (0-{taken.count - 1})"
            )
        if layer in taken.triangle:
            raise ExportError(
                f"--block-sparse-layers names layer {layer}, which is a triangle layer; leave it "
                "out, or choose the triangle layers with --layers"
            )
        if layer in taken.windowed:
            raise ExportError(
                f"--block-sparse-layers names layer {layer}, which slides a window of its own; "
                "such a layer stays as it is: leave it out"
            )


def _notes(others: Collection[int]) -> tuple[str, ...]:
    if not others:
        return ()
    return (
        f"layers {layer_ranges(others, ', ')} of the plan's block-sparse layers have another role "
        "and keep it",
    )
