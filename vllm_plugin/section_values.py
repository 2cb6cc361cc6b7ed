"""The values of the section `trianglemix`, each read and checked by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

from trianglemix.custom_ops.block_sparse.contract import ATTR_MASS, ATTR_MIN_LENGTH, BlockRule
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.options import parse_layers

SECTION: Final = "trianglemix"
NO_LAYERS: Final = "none"
RULE: Final = "block_rule"
_PATTERN_NUMBERS: Final = tuple(field.name for field in fields(TrianglePattern))
_RULE_NUMBERS: Final = tuple(field.name for field in fields(BlockRule))


def read_layers(name: str, given: Any) -> frozenset[int]:
    """The layers of `section[name]`: `"5,7,10,15-35"`, `[5, 7, 10]`, `"none"`.

    Raises:
        ConfigurationError, ExportError: it is none of these, or names a layer twice.
    """
    if isinstance(given, str):
        if given.strip() == NO_LAYERS:
            return frozenset()
        return frozenset(parse_layers(given, f"{SECTION}.{name}"))
    if isinstance(given, Sequence) and all(_is_integer(layer) for layer in given):
        if len(set(given)) != len(given):
            raise ConfigurationError(f"{SECTION}.{name} names a layer twice: {list(given)}")
        return frozenset(given)
    raise ConfigurationError(
        f'{SECTION}.{name} is {given!r}, but must be a list like "5,7,10,15-35" or [5, 7, 10]'
    )


def read_pattern(given: Any, base: TrianglePattern) -> TrianglePattern:
    """The pattern of `section["pattern"]`, over `base` where it leaves numbers out.

    Raises:
        ConfigurationError: neither three numbers nor an object of some of them, or out of range.
    """
    if given is None:
        return base
    numbers = given
    if isinstance(given, Mapping):
        _check_keys("pattern", given, _PATTERN_NUMBERS)
        numbers = [given.get(name, getattr(base, name)) for name in _PATTERN_NUMBERS]
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    if not (listed and len(numbers) == len(_PATTERN_NUMBERS) and all(map(_is_integer, numbers))):
        raise ConfigurationError(
            f"{SECTION}.pattern is {given!r}, but must be three numbers: sinks, window, last rows"
        )
    return TrianglePattern(*numbers)


def read_rule(section: Mapping[str, Any], base: BlockRule) -> BlockRule:
    """The rule of block-sparse layers: `mass`, `min_length` and `block_rule`, over `base`.

    Raises:
        ConfigurationError: no numbers, out of range, or a number given in two places.
    """
    given = section.get(RULE, {})
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"{SECTION}.{RULE} is {given!r}, but must be an object with some of "
            f"{', '.join(_RULE_NUMBERS)}"
        )
    _check_keys(RULE, given, _RULE_NUMBERS)
    changes = dict(given)
    for name in (ATTR_MASS, ATTR_MIN_LENGTH):
        if name in section:
            if name in given:
                raise ConfigurationError(
                    f"{SECTION}.{name} and {SECTION}.{RULE}.{name} are given together; say it once"
                )
            changes[name] = section[name]
    for name, value in changes.items():
        if not _is_integer(value) and not (name == ATTR_MASS and isinstance(value, float)):
            raise ConfigurationError(
                f"{SECTION}: {name} is {value!r}, but must be a "
                f"{'number above 0, at most 1' if name == ATTR_MASS else 'whole number'}"
            )
    return replace(base, **changes)


def _check_keys(name: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigurationError(
            f"{SECTION}.{name} has {', '.join(unknown)}, but its keys are {', '.join(known)}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
