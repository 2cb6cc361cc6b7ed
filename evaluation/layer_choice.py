"""Which layers of a Hugging Face folder an evaluation replaces: by a plan, or by their numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.huggingface import HuggingFaceOptions, shape_of_folder
from trianglemix.exporter.layers.plan import Plan
from trianglemix.exporter.options import BlockRequest, parse_layers

_OPTIONS: Final = ("plan", "layers", "block_sparse_layers", "mass", "min_length")


@dataclass(frozen=True)
class LayerOptions:
    """Options of the command line, as they were given; None = not given."""

    plan: Path | None = None
    layers: str | None = None
    block_sparse_layers: str | None = None
    mass: float | None = None
    min_length: int | None = None

    @property
    def given(self) -> list[str]:
        """Those that were given, by their names on the command line."""
        names = [name for name in _OPTIONS if getattr(self, name) is not None]
        return [f"--{name.replace('_', '-')}" for name in names]

    def parsed(self) -> LayerChoice:
        """Raises TriangleMixError where the command line alone is wrong."""
        if self.plan is not None and self.layers is not None:
            raise ConfigurationError("--plan and --layers name layers in two ways; give one")
        named = parse_layers(self.layers) if self.layers is not None else ()
        text, blocks = self.block_sparse_layers, None
        if text is not None:
            blocks = () if text == "none" else parse_layers(text, "--block-sparse-layers")
        return LayerChoice(named, self.plan, BlockRequest(blocks, self.mass, self.min_length))


@dataclass(frozen=True)
class LayerChoice:
    """Layers by number, or a plan's; what is said of block-sparse layers goes over the plan's."""

    layers: tuple[int, ...]
    plan: Path | None
    blocks: BlockRequest

    def of_folder(self, folder: Path, plain: HuggingFaceOptions) -> HuggingFaceOptions:
        """`plain` with the layers chosen.

        Raises:
            ConfigurationError: the model has no such layers, or the plan is not this model's.
        """
        shape = shape_of_folder(folder)
        layers, pattern, section = self.layers, plain.pattern, None
        if self.plan is not None:
            plan = Plan.load(self.plan)
            plan.check_fits(shape)
            layers = plan.triangle_layers or plan.layers_by_importance
            pattern, section = plan.pattern or pattern, plan.block_sparse
        asked = self.blocks
        sparse = asked.layers if asked.layers is not None else section.layers if section else ()
        for option, named in (("--layers", layers), ("--block-sparse-layers", sparse)):
            if named and max(named) >= shape.num_layers:
                raise ConfigurationError(
                    f"{option} names layer {max(named)}, but the model has {shape.num_layers} "
                    f"layers (0-{shape.num_layers - 1})"
                )
        if asked.changes_rule and not sparse:
            raise ConfigurationError(
                "--mass and --min-length are of block-sparse layers, of which there are none; name "
                "some with --block-sparse-layers, or give a plan that does"
            )
        rule = asked.over(section.rule if section else plain.rule)
        return replace(
            plain, triangle_layers=layers, pattern=pattern, block_sparse_layers=sparse, rule=rule
        )


def name_of(chosen: HuggingFaceOptions) -> str:
    """`2 triangle and 1 block-sparse layers`; `dense` where no layer is replaced."""
    counts = (
        (len(chosen.triangle_layers), "triangle"),
        (len(chosen.block_sparse_layers), "block-sparse"),
    )
    named = " and ".join(f"{count} {kind}" for count, kind in counts if count)
    return f"{named} layers" if named else "dense"
