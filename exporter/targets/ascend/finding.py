"""What the linter says: a rule, where the rule comes from, and the place in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trianglemix.exporter.targets.ascend.lint_model import LintModel


class Severity(Enum):
    """ERROR: atc refuses it, or the numbers would be wrong. WARNING: it depends. NOTE: unproven."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong. `check` yields places (a node's or value's name) and texts."""

    name: str
    severity: Severity
    source: str
    check: Callable[[LintModel], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Finding:
    """One place where a rule is broken."""

    rule: str
    severity: Severity
    place: str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.severity.value} [{self.rule}] {self.place}: {self.message} ({self.source})"
