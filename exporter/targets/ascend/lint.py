"""Checks a model against everything known of ATC's parser and compiler, without CANN.

What it cannot know: whether the compiler supports every listed operator for these types and shapes
on a chip. Only `atc` says that; this finds what would certainly fail, or silently differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from rich.console import Console
from rich.text import Text
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets.ascend import (
    rules_compiler,
    rules_custom,
    rules_numbers,
    rules_operators,
)
from trianglemix.exporter.targets.ascend.lint_model import (
    Finding,
    LengthAxes,
    LintModel,
    Rule,
    Severity,
)
from trianglemix.exporter.targets.ascend.soc import Soc

RULES: Final = tuple(
    value
    for module in (rules_operators, rules_compiler, rules_numbers, rules_custom)
    for value in vars(module).values()
    if isinstance(value, Rule)
)
_COLOURS: Final = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def lint(model: LintModel) -> list[Finding]:
    """Every finding, errors first, else in the order of the rules."""
    found = [
        Finding(rule.name, rule.severity, place, message, rule.source)
        for rule in RULES
        for place, message in rule.check(model)
    ]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


def lint_file(
    path: Path, soc: Soc | None = None, length_axes: LengthAxes | None = None
) -> list[Finding]:
    """Lints a file; its external weights are not read.

    Raises:
        ExportError: the file is no ONNX model.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path} cannot be read as an ONNX model: {error}") from error
    return lint(LintModel(proto, soc, path, length_axes))


def has_errors(findings: list[Finding]) -> bool:
    """Whether atc would certainly fail, or the numbers be wrong."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def print_findings(path: Path, findings: list[Finding], console: Console) -> None:
    """A line for each finding and a last one with their number.

    Raises:
        ExportError: there are errors.
    """
    for finding in findings:
        word = finding.severity.value
        console.print(Text(word, _COLOURS[finding.severity]), end=" ")
        text = str(finding).removeprefix(f"{word} ")
        console.print(text)
    counts = {
        severity: sum(finding.severity is severity for finding in findings) for severity in Severity
    }
    summary = ", ".join(f"{count} {severity.value}s" for severity, count in counts.items())
    console.print(f"{path}: {summary}; atc itself has not seen it")
    if counts[Severity.ERROR]:
        raise ExportError(f"{path} would not pass atc: {summary}")
