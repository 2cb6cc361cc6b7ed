"""Finds plug-ins: what stands in a folder under a name that does not start with an underscore.

A plug-in is a file, or a folder in which a file called as what it is (`target.py`) holds it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import cast

from trianglemix.exporter.attention.sites import Pattern
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets._target import Target


def all_patterns() -> list[Pattern]:
    """The `PATTERN` of every module in `patterns/`, sorted by name."""
    return [cast(Pattern, plugin) for plugin in _plugins("patterns", "PATTERN")]


def all_targets() -> dict[str, Target]:
    """The `TARGET` of every file in `targets/`, and of every folder's `target.py`, by its name."""
    targets = [cast(Target, plugin) for plugin in _plugins("targets", "TARGET")]
    return {target.name: target for target in targets}


def find_target(name: str) -> Target:
    """The target of that name; raises ExportError where there is none."""
    targets = all_targets()
    if name not in targets:
        raise ExportError(f"there is no target {name}; targets: {', '.join(sorted(targets))}")
    return targets[name]


def _plugins(folder: str, attribute: str) -> list[object]:
    package = import_module(f"trianglemix.exporter.{folder}")
    return [
        getattr(import_module(name), attribute)
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name)
        if not module.name.startswith("_")
        for name in [f"{package.__name__}.{module.name}" + f".{attribute.lower()}" * module.ispkg]
    ]
