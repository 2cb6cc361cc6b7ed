"""A comparison as JSON and as a table on the screen."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.comparison import Comparison
from trianglemix.evaluation.statistics import Interval, Ratio


def check_output(path: Path) -> None:
    """Raises ConfigurationError where a file and its page cannot go: now, not after hours."""
    if not path.parent.is_dir():
        raise ConfigurationError(f"the folder of {path} does not exist; make it first")
    if path.suffix == ".html":
        raise ConfigurationError(f"{path} is where the page would go; name a .json file")
    existed = path.exists()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()


def save_json(comparison: Comparison, path: Path) -> None:
    """Everything: the setting, the machine, the rows, each answer."""
    runs = [run for run in (comparison.baseline, comparison.candidate) if run]
    content: dict[str, Any] = {
        "tokens": comparison.setup.tokens,
        "samples": comparison.setup.samples,
        "first_seed": comparison.setup.first_seed,
        "machine": platform.platform(),
        "trianglemix": version("trianglemix"),
        "rows": [asdict(row) for row in comparison.rows],
        "models": [
            {
                "name": run.name,
                **run.facts,
                "peak_memory_mb": run.peak_memory_mb,
                "median_ttft_s": run.median_ttft_s(),
                "outcomes": [asdict(outcome) for outcome in run.outcomes],
            }
            for run in runs
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table_of(comparison: Comparison) -> Table:
    """Tasks down, models across; percent right, points of difference, with 95% intervals."""
    base, ours = comparison.baseline, comparison.candidate
    title = f"{comparison.setup.tokens} tokens, {comparison.setup.samples} samples a task"
    if base is None:
        table = Table("task", f"{ours.name}, %", "time to first token, s", title=title)
        for row in comparison.rows:
            ttft = ours.median_ttft_s(None if row.task == "all" else row.task)
            table.add_row(row.task, percent(row.candidate), f"{ttft:.2f}")
        return table
    table = Table(
        "task",
        f"{base.name}, %",
        f"{ours.name}, %",
        "difference, points",
        "ttft ratio",
        title=title,
    )
    for row in comparison.rows:
        table.add_row(
            row.task,
            percent(row.baseline),
            percent(row.candidate),
            percent(row.difference, signed=True),
            ratio_text(row.ttft_ratio),
        )
    return table


def warnings_of(comparison: Comparison) -> list[str]:
    """Of each model with block-sparse layers: prompts so short that these were dense."""
    warnings = []
    for run in (comparison.baseline, comparison.candidate):
        if run is None or not run.facts.get("rule"):
            continue
        rule, lengths = BlockRule(**run.facts["rule"]), [o.prompt_tokens for o in run.outcomes]
        dense = sum(drops_nothing(rule, tokens) for tokens in lengths)
        if dense:
            warnings.append(
                f"{run.name}: the block-sparse layers dropped nothing of {dense} of the "
                f"{len(lengths)} prompts, which are too short for it ({min(lengths)} to "
                f"{max(lengths)} tokens, min_length {rule.min_length})"
            )
    return warnings


def drops_nothing(rule: BlockRule, tokens: int) -> bool:
    """Whether the rule keeps every block of a prompt for certain."""
    return rule.exact_length is None or tokens <= rule.exact_length


def percent(interval: Interval, signed: bool = False) -> str:
    """`75.0 (61.2 to 85.1)`."""
    form = "{:+.1f}" if signed else "{:.1f}"
    mean, low, high = (
        form.format(100 * value) for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} ({low} to {high})"


def ratio_text(ratio: Ratio | None) -> str:
    """`0.55 (0.53 to 0.58)`; a dash where there is none."""
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
