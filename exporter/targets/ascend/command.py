"""What the target ascend adds to the command line: its options, and the linter's output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.targets.ascend.finding import Finding, Severity
from trianglemix.exporter.targets.ascend.lint import lint_file
from trianglemix.exporter.targets.ascend.settings import AscendRequest
from trianglemix.exporter.targets.ascend.soc import find_soc

TARGET_NAME: Final = "ascend"
_NAMES: Final = {"soc": "--soc", "chunk": "--chunk", "max_length": "--max-length",
                 "block": "--block", "lowering": "--lowering"}  # fmt: skip
_COLOURS: Final = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}

OPTIONS: Final = (
    click.option("--soc", help="Ascend: the chip, as atc names it.  [default: Ascend910B3]"),
    click.option(
        "--chunk", type=click.IntRange(1), help="Ascend: prompt rows per call.  [default: 1024]"
    ),
    click.option(
        "--max-length",
        type=click.IntRange(1),
        help="Ascend: tokens of the cache.  [default: the context, at most 8192]",
    ),
    click.option(
        "--block", type=click.IntRange(1), help="Ascend: rows of a block; else by the cost model."
    ),
    click.option(
        "--lowering",
        type=click.Choice(["block", "custom"]),
        help="Ascend: attention in standard operators, or as the custom operator of "
        "custom_ops/ascend (never compiled by CANN).  [default: block]",
    ),
    click.option("--cost", is_flag=True, help="Ascend: print the cost model's tables."),
    click.option(
        "--lint",
        type=click.Choice([TARGET_NAME]),
        help="Only check SOURCE, an ONNX file, against what atc reads.",
    ),
)


def read_request(given: Mapping[str, Any]) -> AscendRequest | None:
    """The options of the target ascend; None for another target.

    Raises:
        click.UsageError: an option of this target with another one.
    """
    chosen = {name: given[name] for name in _NAMES if given[name] is not None}
    if TARGET_NAME in (given["target"], given["lint"]):
        _check_custom(given)
        return AscendRequest(**chosen, cost=given["cost"])
    if chosen or given["cost"]:
        option = next((_NAMES[name] for name in chosen), "--cost")
        raise click.UsageError(f"{option} belongs to --target {TARGET_NAME}")
    return None


def _check_custom(given: Mapping[str, Any]) -> None:
    if given["lowering"] != "custom":
        return
    for name, option in (("block", "--block"), ("cost", "--cost")):
        if given[name]:
            raise click.UsageError(
                f"{option} is about the block form, but --lowering custom keeps the operator; "
                f"leave {option} out"
            )


def lint_alone(given: Mapping[str, Any], console: Console) -> bool:
    """Lints the source if `--lint` was given.

    Raises:
        ExportError: the source cannot be read, or has errors.
    """
    request = read_request(given)
    if not given["lint"] or request is None:
        return False
    print_findings(given["source"], lint_file(given["source"], find_soc(request.soc)), console)
    return True


def print_findings(path: Path, findings: list[Finding], console: Console) -> None:
    """A line for each finding and a last one with their number.

    Raises:
        ExportError: there are errors.
    """
    for finding in findings:
        word = finding.severity.value
        console.print(f"[{_COLOURS[finding.severity]}]{word}[/]", end=" ")
        text = str(finding).removeprefix(f"{word} ")
        console.print(text, markup=False, highlight=False)
    counts = {
        severity: sum(finding.severity is severity for finding in findings) for severity in Severity
    }
    summary = ", ".join(f"{count} {severity.value}s" for severity, count in counts.items())
    console.print(f"{path}: {summary}; atc itself has not seen it", highlight=False, markup=False)
    if counts[Severity.ERROR]:
        raise ExportError(f"{path} would not pass atc: {summary}")
