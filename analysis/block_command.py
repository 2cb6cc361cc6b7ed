"""`trianglemix-analyze --block-sparse`: measures, chooses and checks the block-sparse layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.table import Table
from trianglemix.analysis.block_check import BlockCheck, check_blocks
from trianglemix.analysis.block_page import MEASURED
from trianglemix.analysis.block_select import (
    RULE,
    BlockChoice,
    choose_block_layers,
    shortest_sparse,
)
from trianglemix.analysis.block_shares import (
    BlockSample,
    Measured,
    as_json,
    mean_figures,
    mean_of_layers,
)
from trianglemix.analysis.data import DataSettings, block_prompts
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.model import AnalysedModel, Precision, candidate_layers, load_model
from trianglemix.analysis.record import Record, probe_all
from trianglemix.analysis.trials import BlockTaskScorer, open_model
from trianglemix.command_line import progress_bar
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.run import Setup
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.layers.plan import Plan

_LEAST_TOKENS: Final = 1024
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class BlockOptions:
    """The model, the prompts (`samples` of each length, tokens), the masses, and the check."""

    folder: Path
    output: Path
    data: Path | None
    lengths: tuple[int, ...]
    masses: tuple[float, ...]
    samples: int
    device: str
    precision: Precision
    check: Setup | None
    allowed_loss: float

    def settings(self, length: int) -> DataSettings:
        """The prompts of one length."""
        return DataSettings(self.samples, length, self.data)


def add_block_sparse(plan: Plan, options: BlockOptions, console: Console) -> Plan:
    """The plan with its section on block-sparse layers; its triangle layers stay.

    Raises:
        AnalysisError: no layer may be block-sparse, or the check did not accept them.
        PlanError: the plan is for another model.
    """
    measured = _measure(plan, options, console)
    choice = choose_block_layers(measured)
    _show(console, measured, choice)
    check = _check(plan, choice, options, console) if options.check else None
    if check:
        _show_check(console, check)
        _refuse(check)
    densities = {
        length: {layer: round(by_mass[choice.rule.mass].density, 4) for layer, by_mass in x.items()}
        for length, x in measured.items()
    }
    section = BlockSparsePlan(choice.layers, choice.rule, densities)
    origin = f"Measured by trianglemix-analyze --block-sparse: {RULE}"
    origin += f"; check: {check.verdict}" if check else "; not checked on tasks"
    figures = _figures(measured, choice, options, check)
    return replace(plan, block_sparse=replace(section, origin=origin, figures=figures))


def _measure(plan: Plan, options: BlockOptions, console: Console) -> Measured:
    subject = load_model(options.folder, options.device, options.precision)
    plan.check_fits(subject.fingerprint)
    subject.check_tokens("--lengths", max(options.lengths))
    layers = tuple(
        layer for layer in candidate_layers(subject.model.config) if layer not in plan.chosen_layers
    )
    if not layers:
        raise AnalysisError(
            "every layer that sees the whole prompt is a triangle layer, so none is left to be "
            "block-sparse; make a plan with fewer triangle layers"
        )
    prompts = [
        (ids, length)
        for length in options.lengths
        for ids in block_prompts(subject.tokenizer, options.settings(length))
    ]
    done = _probe_all(plan, subject, layers, prompts, options, console)
    return mean_figures(done, layers, options.masses)


def _triangles(plan: Plan) -> tuple[int, ...]:
    """As an export has them: a plan may only rank its layers, and then they all are."""
    return tuple(sorted(plan.chosen_layers))


def _probe_all(
    plan: Plan,
    subject: AnalysedModel,
    layers: tuple[int, ...],
    prompts: list[tuple[tuple[int, ...], int]],
    options: BlockOptions,
    console: Console,
) -> list[BlockSample]:
    from trianglemix.analysis.block_probe import BlockProbe  # torch, which load_model has found

    pattern = plan.pattern or TrianglePattern()
    probe = BlockProbe(pattern, _triangles(plan), layers, options.masses)
    settings = asdict(probe) | {
        "model": asdict(plan.fingerprint),
        "data": [options.settings(length).description for length in options.lengths],
        "precision": options.precision,
    }
    record = Record(options.output.with_suffix(".blocks.jsonl"), settings, BlockSample)
    with progress_bar(console) as bar:
        task = bar.add_task("blocks", total=len(prompts))

        def one(prompt: tuple[tuple[int, ...], int]) -> BlockSample:
            return probe(subject.model, *prompt)

        return probe_all(prompts, one, record, lambda n: bar.update(task, completed=n))


def _check(plan: Plan, choice: BlockChoice, options: BlockOptions, console: Console) -> BlockCheck:
    assert options.check is not None
    pattern = plan.pattern or TrianglePattern()
    model = open_model(options.folder, options.device, options.precision, pattern, choice.rule)
    layers = _triangles(plan), choice.layers
    with progress_bar(console) as bar:
        task = bar.add_task("check", total=3 * options.check.samples * len(options.check.tasks))
        score = BlockTaskScorer(
            model, options.check, layers, lambda text: bar.update(task, advance=1, description=text)
        )
        return check_blocks(choice.layers, score, options.allowed_loss)


def _refuse(check: BlockCheck) -> None:
    if check.verdict == "rejected":
        lost = -100 * check.rule.difference.mean
        raise AnalysisError(
            f"block-sparse layers lost {lost:.1f} points on the check, but only "
            f"{100 * check.allowed_loss:g} are allowed; the plan is left without them: try larger "
            "masses, or fewer triangle layers"
        )
    if check.verdict == "blind":
        raise AnalysisError(
            "the check does not tell random blocks from the rule's, so it proves nothing; the plan "
            "is left without block-sparse layers: take more samples, longer prompts or an easier "
            "task, or --check-samples 0 to go by recall alone"
        )


def _figures(
    measured: Measured, choice: BlockChoice, options: BlockOptions, check: BlockCheck | None
) -> dict[str, Any]:
    return {
        "rule": RULE,
        "data": [options.settings(length).description for length in options.lengths],
        "precision": options.precision,
        "left_out": {str(layer): why for layer, why in choice.left_out.items()},
        MEASURED: as_json(measured),
        "check": asdict(check) if check else None,
    }


def _show(console: Console, measured: Measured, choice: BlockChoice) -> None:
    longest = max(measured)
    columns = ("layer", "kept", "by every row", "recall", "5th percentile", "worst head", "")
    title = f"{longest} tokens, mass {choice.rule.mass:g}"
    table = Table(*columns, title=title)
    for layer, by_mass in measured[longest].items():
        shares = [f"{x:.3f}" for x in asdict(by_mass[choice.rule.mass]).values()]
        table.add_row(str(layer), *shares, choice.left_out.get(layer, "block-sparse"))
    console.print(table)
    for length, by_layer in measured.items():
        chosen = {layer: by_layer[layer] for layer in choice.layers}
        density = mean_of_layers(chosen, choice.rule.mass).density
        console.print(f"{length} tokens: the {len(chosen)} layers keep {density:.3f} on average")


def _show_check(console: Console, check: BlockCheck) -> None:
    table = Table("block-sparse layers", "right %", "against the plan alone, points (95%)")
    table.add_row("none", f"{100 * check.plan.mean:.1f}", "")
    for name, trial in (("by the rule", check.rule), ("random blocks", check.control)):
        d = trial.difference
        change = f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
        table.add_row(name, f"{100 * trial.score.mean:.1f}", change)
    console.print(table, f"check: {check.verdict}")


def check_setup(task: str, tokens: int, samples: int, lengths: tuple[int, ...]) -> Setup | None:
    """The check that the command line asks for, of layers that were measured at these lengths.

    Raises:
        ConfigurationError: there is no such task, or its prompts are so short that all is dense.
    """
    if not samples:
        return None
    shortest = shortest_sparse(lengths)
    if tokens <= shortest:
        raise ConfigurationError(
            f"--check-tokens is {tokens}, but prompts of up to {shortest} tokens stay dense, by "
            "the shortest of --lengths, so that the check would prove nothing; give more"
        )
    return Setup(pick_tasks([task]), tokens, samples)


def parse_lengths(text: str) -> tuple[int, ...]:
    """`4000,8000` as numbers, ascending.

    Raises:
        ConfigurationError: no numbers, or prompts too short to hold a block that could go.
    """
    lengths = tuple(sorted(set(_numbers("--lengths", text, int))))
    if lengths[0] < _LEAST_TOKENS:
        raise ConfigurationError(
            f"--lengths has {lengths[0]} tokens, but prompts of at least {_LEAST_TOKENS} tell how "
            "much is kept; give longer ones"
        )
    return lengths


def parse_masses(text: str) -> tuple[float, ...]:
    """`0.8,0.95` as numbers, ascending.

    Raises:
        ConfigurationError: no numbers, or one that is no share.
    """
    return tuple(BlockRule(mass=x).mass for x in sorted(set(_numbers("--masses", text, float))))


def _numbers(option: str, text: str, read: Callable[[str], Number]) -> list[Number]:
    try:
        return [read(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"{option} {text!r} is no list of numbers such as 1,2") from error
