"""What the user configured: the section `trianglemix` of vLLM's `--additional-config`.

    {"trianglemix": {"enabled": true, "layers": "5,7,10,15-35", "pattern": [8, 512, 128]}}
    {"trianglemix": {"layers": "16-31", "block_sparse_layers": "0-15", "mass": 0.9}}
    {"trianglemix": {"plan": "plan.json"}}
    {"trianglemix": {}}                          the plan shipped for a model of this shape

`VLLM_TRIANGLEMIX_ENABLED`, where it is set, decides (1 on, 0 off); else `enabled`; else a section
that is there means on. Without a section and without the variable the plug-in does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from trianglemix.custom_ops.block_sparse.contract import ATTR_MASS, ATTR_MIN_LENGTH, BlockRule
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.layers.plan import Fingerprint, Plan, find_shipped_plan
from trianglemix.exporter.options import layer_ranges
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.section_values import (
    NO_LAYERS,
    RULE,
    SECTION,
    read_layers,
    read_pattern,
    read_rule,
)

VARIABLE: Final = "VLLM_TRIANGLEMIX_ENABLED"
_BLOCKS: Final = "block_sparse_layers"
_OF_BLOCKS: Final = (ATTR_MASS, ATTR_MIN_LENGTH, RULE)
_KEYS: Final = ("enabled", "layers", "pattern", "plan", _BLOCKS, *_OF_BLOCKS)
_SWITCH: Final = {"1": True, "0": False}


@dataclass(frozen=True)
class ServingConfig:
    """The triangle layers of the served model (counted from 0), their pattern, and who chose them.

    `block_layers` are its block-sparse layers, which follow `rule`; `origin` is in words.
    """

    layers: frozenset[int]
    pattern: TrianglePattern
    origin: str
    block_layers: frozenset[int] = frozenset()
    rule: BlockRule = field(default_factory=BlockRule)

    @property
    def keeps(self) -> dict[int, Keeps]:
        """By layer what its rows keep, of all layers that are not dense."""
        triangle: dict[int, Keeps] = dict.fromkeys(self.layers, self.pattern)
        return triangle | dict.fromkeys(self.block_layers, self.rule)

    @property
    def salt(self) -> str:
        """Tells caches of this configuration from those of any other: hexadecimal digits."""
        parts: list[Any] = [sorted(self.layers), self.pattern.as_attributes()]
        if self.block_layers:
            parts += [sorted(self.block_layers), self.rule.as_attributes()]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def description(self) -> str:
        """One line for the log."""
        parts = []
        if self.layers:
            sink, window, last = self.pattern.as_attributes().values()
            parts.append(
                f"triangle layers {layer_ranges(self.layers)}, pattern {sink} sinks, window "
                f"{window}, last {last}"
            )
        if self.block_layers:
            parts.append(
                f"block-sparse layers {layer_ranges(self.block_layers)}, mass {self.rule.mass} of "
                f"prompts of more than {self.rule.min_length} tokens"
            )
        return f"{'; '.join(parts)}, chosen by {self.origin}"

    def as_section(self) -> dict[str, Any]:
        """The same configuration as a section, with nothing left to look up."""
        section = {
            "enabled": True,
            "layers": layer_ranges(self.layers) or NO_LAYERS,
            "pattern": list(self.pattern.as_attributes().values()),
        }
        if self.block_layers:
            section[_BLOCKS] = layer_ranges(self.block_layers)
            section[RULE] = self.rule.as_attributes()
        return section


def is_enabled(additional_config: Any, environment: Mapping[str, str]) -> bool:
    """Whether anything is to be done: see the module's docstring.

    Raises:
        ConfigurationError: the section is not an object, `enabled` no truth value, or the variable
            neither 0 nor 1.
    """
    section = _section(additional_config)
    switch = environment.get(VARIABLE)
    if switch is not None:
        if switch not in _SWITCH:
            raise ConfigurationError(
                f"{VARIABLE} is {switch!r}, but switches TriangleMix on with 1 and off with 0"
            )
        return _SWITCH[switch]
    if section is None:
        return False
    enabled = section.get("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigurationError(f"{SECTION}.enabled is {enabled!r}, but must be true or false")
    return enabled


def read_config(additional_config: Any, model: Fingerprint) -> ServingConfig:
    """The configuration of an enabled plug-in, checked against the model's shape.

    Raises:
        ConfigurationError: a key that is unknown, a value that is not understood, a layer that the
            model has not or that has two roles, or no layers, and no plan is shipped for a model
            of this shape.
        ExportError: a list of layers or a plan that cannot be read, or a plan of another shape.
    """
    section = _section(additional_config) or {}
    unknown = sorted(set(section) - set(_KEYS))
    if unknown:
        raise ConfigurationError(
            f"{SECTION} in --additional-config has {', '.join(unknown)}, but its keys are "
            f"{', '.join(_KEYS)}"
        )
    if "layers" in section and "plan" in section:
        raise ConfigurationError(
            f"{SECTION}.layers and {SECTION}.plan are given together; name the layers in one way"
        )
    if "layers" in section:
        layers = read_layers("layers", section["layers"])
        plan, origin, base = None, "the configuration", TrianglePattern()
    else:
        plan, origin = _plan(section.get("plan"), model)
        layers, base = plan.chosen_layers, plan.pattern or TrianglePattern()
    pattern = read_pattern(section.get("pattern"), base)
    blocks = _block_layers(section, plan, layers)
    config = ServingConfig(layers, pattern, origin, blocks, _rule(section, plan, blocks))
    _check_layers(config, model.num_layers)
    return config


def _block_layers(
    section: Mapping[str, Any], plan: Plan | None, triangle: frozenset[int]
) -> frozenset[int]:
    """The block-sparse layers: those that are named, else the plan's without another role."""
    if _BLOCKS not in section:
        chosen = plan.block_sparse.layers if plan is not None and plan.block_sparse else ()
        return frozenset(chosen) - triangle
    layers = read_layers(_BLOCKS, section[_BLOCKS])
    if layers & triangle:
        raise ConfigurationError(
            f"{SECTION}.{_BLOCKS} names {layer_ranges(layers & triangle, ', ')}, of the triangle "
            f"layers; a layer is one of the two: leave it out, or name others in {SECTION}.layers"
        )
    return layers


def _rule(section: Mapping[str, Any], plan: Plan | None, blocks: frozenset[int]) -> BlockRule:
    given = [name for name in _OF_BLOCKS if name in section]
    if given and not blocks:
        raise ConfigurationError(
            f"{SECTION} has {', '.join(given)}, which are of block-sparse layers, but has none; "
            f"name some in {SECTION}.{_BLOCKS}"
        )
    base = plan.block_sparse.rule if plan is not None and plan.block_sparse else BlockRule()
    return read_rule(section, base)


def _plan(path: Any, model: Fingerprint) -> tuple[Plan, str]:
    """The plan of a file, or the shipped one, and which of the two in words."""
    if path is None:
        shipped = find_shipped_plan(model)
        if shipped is None:
            raise ConfigurationError(
                f"no plan is shipped for a model of this shape ({_shape(model)}); give "
                f"{SECTION}.layers or {SECTION}.plan (trianglemix-analyze makes plans)"
            )
        return shipped, f"the plan shipped for {shipped.name} ({shipped.origin})"
    if not isinstance(path, str):
        raise ConfigurationError(f"{SECTION}.plan is {path!r}, but must be a path")
    plan = Plan.load(Path(path))
    plan.check_fits(model)
    return plan, f"the plan {path} ({plan.origin})"


def _section(additional_config: Any) -> dict[str, Any] | None:
    if not isinstance(additional_config, Mapping):  # another platform's own object
        return None
    section = additional_config.get(SECTION)
    if section is not None and not isinstance(section, dict):
        raise ConfigurationError(
            f"{SECTION} in --additional-config is {section!r}, but must be an object with the keys "
            f"{', '.join(_KEYS)}"
        )
    return section


def _check_layers(config: ServingConfig, count: int) -> None:
    strange = sorted(layer for layer in config.keeps if not 0 <= layer < count)
    if strange:
        raise ConfigurationError(
            f"{SECTION} names layer {strange[0]}, but the model has {count} layers "
            f"(0-{count - 1}); use layers chosen for this model"
        )
    if not config.keeps:
        raise ConfigurationError(
            f"{SECTION}.layers names no layer; leave TriangleMix off to serve the dense model"
        )


def _shape(model: Fingerprint) -> str:
    return (
        f"{model.num_layers} layers, {model.num_heads}/{model.kv_num_heads} heads of "
        f"{model.head_size}, hidden size {model.hidden_size}, vocabulary {model.vocabulary_size}"
    )
