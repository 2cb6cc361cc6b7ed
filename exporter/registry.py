"""Finds plug-ins: every module of a folder whose name does not start with an underscore."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import cast

from trianglemix.exporter.attention.sites import Pattern
from trianglemix.exporter.targets._target import Target


def all_patterns() -> list[Pattern]:
    """The `PATTERN` of every module in `patterns/`, sorted by name."""
    return [cast(Pattern, plugin) for plugin in _plugins("patterns", "PATTERN")]


def all_targets() -> dict[str, Target]:
    """The `TARGET` of every module in `targets/`, by its name."""
    targets = [cast(Target, plugin) for plugin in _plugins("targets", "TARGET")]
    return {target.name: target for target in targets}


def _plugins(folder: str, attribute: str) -> list[object]:
    package = import_module(f"trianglemix.exporter.{folder}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [
        getattr(import_module(f"{package.__name__}.{name}"), attribute)
        for name in names
        if not name.startswith("_")
    ]
