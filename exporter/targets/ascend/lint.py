"""Checks a model against everything known of ATC's parser and compiler, without CANN.

What it cannot know: whether the compiler supports every listed operator for these types and shapes
on a chip. Only `atc` says that; this finds what would certainly fail, or silently differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets.ascend import (
    rules_compiler,
    rules_custom,
    rules_numbers,
    rules_parser,
)
from trianglemix.exporter.targets.ascend.finding import Finding, Severity
from trianglemix.exporter.targets.ascend.lint_model import LengthAxes, LintModel
from trianglemix.exporter.targets.ascend.soc import Soc

RULES: Final = (
    *rules_parser.RULES,
    *rules_compiler.RULES,
    *rules_numbers.RULES,
    *rules_custom.RULES,
)


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
