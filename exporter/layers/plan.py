"""The layer plan file: which layers of which model may be triangle layers.

`trianglemix-analyze` writes it, `trianglemix-export --plan` reads it, `models/<family>/plan.json`
ships it. As JSON::

    {"format_version": 1,
     "model": {"name": "SmolLM2-135M-Instruct",
               "fingerprint": {"num_layers": 30, "num_heads": 9, "kv_num_heads": 3,
                               "head_size": 64, "hidden_size": 576, "vocabulary_size": 49152}},
     "pattern": {"num_sink_tokens": 8, "sliding_window_size": 512, "num_last_tokens": 128},
     "layers_by_importance": [29, 25, 28],
     "triangle_layers": [25, 28, 29],
     "block_sparse": {"layers": [0, 1, 2], "densities": {"8000": {"0": 0.41, "1": 0.3, "2": 0.35}},
                      "rule": {"mass": 0.95, "min_length": 4096, "num_sink_tokens": 8,
                               "sliding_window_size": 128, "num_last_tokens": 128},
                      "origin": "in words", "figures": {}},
     "origin": "where the choice comes from, in words",
     "figures": {"any": "numbers worth keeping"}}

Layers count from 0. `layers_by_importance` names the least important layer (the best triangle
layer) first; `triangle_layers` is the recommended set. At least one of the two is there; `pattern`,
`block_sparse`, `figures` and the last two fields of the fingerprint may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Final

from trianglemix.custom_ops.strict import STRICT
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.errors import PlanError
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.options import layer_ranges
from trianglemix.manifest.checked_json import (
    Count,
    Index,
    JsonFileError,
    JsonVersionError,
    read_checked,
    shown,
)

FORMAT_VERSION: Final = 1
FILE_NAME: Final = "plan.json"


@dataclass(frozen=True)
class Fingerprint:
    """The shape of a model. Sizes that a file does not tell are None and fit everything."""

    __pydantic_config__: ClassVar[Any] = STRICT

    num_layers: Count
    num_heads: Count
    kv_num_heads: Count
    head_size: Count
    hidden_size: Count | None = None
    vocabulary_size: Count | None = None

    def mismatches(self, other: Fingerprint) -> list[str]:
        """`name a != b` for each size that both know and that differs."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} {mine[name]} != {theirs[name]}"
            for name in mine
            if None not in (mine[name], theirs[name]) and mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class _PlanModel:
    """The section `model` of the file."""

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class _PlanFile:
    """What stands in the file."""

    __pydantic_config__: ClassVar[Any] = STRICT

    model: _PlanModel
    pattern: TrianglePattern | None = None
    layers_by_importance: tuple[Index, ...] | None = None
    triangle_layers: tuple[Index, ...] | None = None
    origin: str = ""
    figures: dict[str, Any] | None = None
    block_sparse: BlockSparsePlan | None = None


@dataclass(frozen=True)
class Plan:
    """A plan file as read. Layers count from 0.

    Raises:
        PlanError: no layers, a layer twice, a layer that the fingerprint's model has not, or a
            block-sparse layer among `triangle_layers`.
    """

    name: str
    fingerprint: Fingerprint
    pattern: TrianglePattern | None = None
    layers_by_importance: tuple[int, ...] = ()
    triangle_layers: tuple[int, ...] = ()
    origin: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    block_sparse: BlockSparsePlan | None = None

    def __post_init__(self) -> None:
        if not self.layers_by_importance and not self.triangle_layers:
            raise PlanError(
                f"plan for {self.name} names no layers; fill layers_by_importance or "
                "triangle_layers"
            )
        for name in ("layers_by_importance", "triangle_layers"):
            self._check_layers(name, getattr(self, name))
        if self.block_sparse is not None:
            self._check_layers("block_sparse", self.block_sparse.layers)
            both = sorted(set(self.block_sparse.layers) & set(self.triangle_layers))
            if both:
                raise PlanError(
                    f"block_sparse of the plan for {self.name} names {layer_ranges(both)}, which "
                    "triangle_layers has too; a layer is one or the other"
                )

    def _check_layers(self, name: str, layers: tuple[int, ...]) -> None:
        count = self.fingerprint.num_layers
        for layer in layers:
            if not 0 <= layer < count:
                raise PlanError(
                    f"{name} of the plan for {self.name} has layer {layer}, but its model has "
                    f"{count} layers (0-{count - 1}); correct the plan"
                )
        if len(set(layers)) != len(layers):
            raise PlanError(f"{name} of the plan for {self.name} names a layer twice: {layers}")

    @property
    def chosen_layers(self) -> frozenset[int]:
        """The recommended set: `triangle_layers`, or else every layer that is listed."""
        return frozenset(self.triangle_layers or self.layers_by_importance)

    @property
    def layer_list(self) -> str:
        """The triangle layers as `--layers` takes them."""
        return layer_ranges(self.chosen_layers)

    def check_fits(self, model: Fingerprint) -> None:
        """Raises PlanError when the plan was made for a model of another shape."""
        differences = self.fingerprint.mismatches(model)
        if differences:
            raise PlanError(
                f"the plan is for {self.name}, but this model has another shape "
                f"({'; '.join(differences)}); pass a plan made for this model"
            )

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": {"name": self.name, "fingerprint": asdict(self.fingerprint)},
            "pattern": self.pattern.as_attributes() if self.pattern else None,
            "layers_by_importance": list(self.layers_by_importance),
            "triangle_layers": list(self.triangle_layers),
            "origin": self.origin,
            "figures": dict(self.figures),
        }
        if self.block_sparse is not None:
            content["block_sparse"] = self.block_sparse.as_json()
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plan file.

        Raises:
            PlanError: unreadable, not JSON, another format version, or fields missing or wrong.
        """
        try:
            content = read_checked(path, _PlanFile, FORMAT_VERSION)
        except JsonVersionError as error:
            raise PlanError(
                f"plan {path} has format version {shown(error.found)}, but this trianglemix reads "
                f"{FORMAT_VERSION}; make the plan again with trianglemix-analyze"
            ) from error
        except JsonFileError as error:
            raise PlanError(
                f"plan {path} {error}; give a file that trianglemix-analyze wrote"
            ) from error
        return cls(
            name=content.model.name,
            fingerprint=content.model.fingerprint,
            pattern=content.pattern,
            layers_by_importance=content.layers_by_importance or (),
            triangle_layers=content.triangle_layers or (),
            origin=content.origin,
            figures=content.figures or {},
            block_sparse=content.block_sparse,
        )

    @property
    def choice(self) -> tuple[object, ...]:
        """All that an export takes from it: two plans that agree here do the same."""
        blocks = self.block_sparse
        return (self.chosen_layers, self.pattern, blocks and (set(blocks.layers), blocks.rule))


def shipped_plans() -> list[Plan]:
    """Every plan under `models/`, sorted by folder name."""
    try:
        root = resources.files("trianglemix.models")
    except ModuleNotFoundError:
        return []
    folders = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda e: e.name)
    return [
        Plan.load(Path(str(folder / FILE_NAME)))
        for folder in folders
        if (folder / FILE_NAME).is_file()
    ]


def find_shipped_plan(model: Fingerprint) -> Plan | None:
    """The shipped plan whose fingerprint fits the model, if there is one.

    Models of one shape may share a plan; its name then lists them all.

    Raises:
        PlanError: several plans fit and disagree.
    """
    fitting = [plan for plan in shipped_plans() if not plan.fingerprint.mismatches(model)]
    if not fitting:
        return None
    names = " or ".join(plan.name for plan in fitting)
    if any(plan.choice != fitting[0].choice for plan in fitting):
        raise PlanError(
            f"several shipped plans fit a model of this shape ({names}) and disagree; "
            "pass the right one with --plan"
        )
    return replace(fitting[0], name=names)
