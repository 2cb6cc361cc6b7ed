"""What the user configured: the section `trianglemix` of vLLM's `--additional-config`.

    {"trianglemix": {"enabled": true, "layers": "5,7,10,15-35", "pattern": [8, 512, 128]}}
    {"trianglemix": {"plan": "plan.json"}}
    {"trianglemix": {}}                          the plan shipped for a model of this shape

`VLLM_TRIANGLEMIX_ENABLED`, where it is set, decides (1 on, 0 off); else `enabled`; else a section
that is there means on. Without a section and without the variable the plug-in does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.layers.plan import Fingerprint, Plan, find_shipped_plan
from trianglemix.exporter.options import layer_ranges, parse_layers

SECTION: Final = "trianglemix"
VARIABLE: Final = "VLLM_TRIANGLEMIX_ENABLED"
_KEYS: Final = ("enabled", "layers", "pattern", "plan")
_SWITCH: Final = {"1": True, "0": False}
_NUMBERS: Final = tuple(field.name for field in fields(TrianglePattern))


@dataclass(frozen=True)
class ServingConfig:
    """The triangle layers of the served model (counted from 0), their pattern, and who chose them.

    `origin` is in words. `kept_dense` are layers that the plan has as block-sparse ones, which this
    plug-in does not serve: they stay dense, which is exact.
    """

    layers: frozenset[int]
    pattern: TrianglePattern
    origin: str
    kept_dense: tuple[int, ...] = ()

    @property
    def salt(self) -> str:
        """Tells caches of this configuration from those of any other: hexadecimal digits."""
        text = json.dumps([sorted(self.layers), self.pattern.as_attributes()], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]

    @property
    def description(self) -> str:
        """One line for the log."""
        sink, window, last = self.pattern.as_attributes().values()
        return (
            f"triangle layers {layer_ranges(self.layers)}, pattern {sink} sinks, window {window}, "
            f"last {last}, chosen by {self.origin}"
        )

    def as_section(self) -> dict[str, Any]:
        """The same configuration as a section, with nothing left to look up."""
        return {
            "enabled": True,
            "layers": layer_ranges(self.layers),
            "pattern": list(self.pattern.as_attributes().values()),
        }


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
            model has not, or no layers, and no plan is shipped for a model of this shape.
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
        pattern = _pattern(section.get("pattern"), TrianglePattern())
        config = ServingConfig(_layers(section["layers"]), pattern, "the configuration")
    else:
        config = _from_plan(section, model)
    _check_layers(config.layers, model.num_layers)
    return config


def _from_plan(section: Mapping[str, Any], model: Fingerprint) -> ServingConfig:
    plan, origin = _plan(section.get("plan"), model)
    pattern = _pattern(section.get("pattern"), plan.pattern or TrianglePattern())
    kept = plan.block_sparse.layers if plan.block_sparse is not None else ()
    return ServingConfig(plan.chosen_layers, pattern, f"{origin} ({plan.origin})", tuple(kept))


def _plan(path: Any, model: Fingerprint) -> tuple[Plan, str]:
    """The plan of a file, or the shipped one, and which of the two in words."""
    if path is None:
        shipped = find_shipped_plan(model)
        if shipped is None:
            raise ConfigurationError(
                f"no plan is shipped for a model of this shape ({_shape(model)}); give "
                f"{SECTION}.layers or {SECTION}.plan (trianglemix-analyze makes plans)"
            )
        return shipped, f"the plan shipped for {shipped.name}"
    if not isinstance(path, str):
        raise ConfigurationError(f"{SECTION}.plan is {path!r}, but must be a path")
    plan = Plan.load(Path(path))
    plan.check_fits(model)
    return plan, f"the plan {path}"


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


def _layers(given: Any) -> frozenset[int]:
    if isinstance(given, str):
        return frozenset(parse_layers(given, f"{SECTION}.layers"))
    if isinstance(given, Sequence) and all(_is_integer(layer) for layer in given):
        if len(set(given)) != len(given):
            raise ConfigurationError(f"{SECTION}.layers names a layer twice: {list(given)}")
        return frozenset(given)
    raise ConfigurationError(
        f'{SECTION}.layers is {given!r}, but must be a list like "5,7,10,15-35" or [5, 7, 10]'
    )


def _pattern(given: Any, base: TrianglePattern) -> TrianglePattern:
    if given is None:
        return base
    numbers = given
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(_NUMBERS))
        if unknown:
            raise ConfigurationError(
                f"{SECTION}.pattern has {', '.join(unknown)}, but its keys are "
                f"{', '.join(_NUMBERS)}"
            )
        numbers = [given.get(name, getattr(base, name)) for name in _NUMBERS]
    if not (isinstance(numbers, Sequence) and not isinstance(numbers, str)
            and len(numbers) == len(_NUMBERS) and all(map(_is_integer, numbers))):  # fmt: skip
        raise ConfigurationError(
            f"{SECTION}.pattern is {given!r}, but must be three numbers: sinks, window, last rows"
        )
    return TrianglePattern(*numbers)


def _check_layers(layers: frozenset[int], count: int) -> None:
    strange = sorted(layer for layer in layers if not 0 <= layer < count)
    if strange:
        raise ConfigurationError(
            f"{SECTION} names layer {strange[0]}, but the model has {count} layers "
            f"(0-{count - 1}); use layers chosen for this model"
        )
    if not layers:
        raise ConfigurationError(
            f"{SECTION}.layers names no layer; leave TriangleMix off to serve the dense model"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shape(model: Fingerprint) -> str:
    return (
        f"{model.num_layers} layers, {model.num_heads}/{model.kv_num_heads} heads of "
        f"{model.head_size}, hidden size {model.hidden_size}, vocabulary {model.vocabulary_size}"
    )
