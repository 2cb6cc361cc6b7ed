"""The tasks there are: every module of `evaluation/tasks` brings one `TASK`."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation import tasks
from trianglemix.evaluation.task import Task


@cache
def all_tasks() -> dict[str, Task]:
    """Every task by name, in alphabetic order."""
    modules = sorted(m.name for m in pkgutil.iter_modules(tasks.__path__) if m.name[0] != "_")
    found: list[Task] = [import_module(f"{tasks.__name__}.{name}").TASK for name in modules]
    return {task.name: task for task in found}


def pick_tasks(names: Sequence[str]) -> list[Task]:
    """The named tasks; all of them when no name is given.

    Raises:
        ConfigurationError: there is no task of that name.
    """
    known = all_tasks()
    for name in names:
        if name not in known:
            raise ConfigurationError(f"there is no task {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())
