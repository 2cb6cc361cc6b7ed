"""`trianglemix-analyze`: which layers of a model may be triangle layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from rich.console import Console
from rich.table import Table
from trianglemix.analysis.block_command import (
    BlockOptions,
    add_block_sparse,
    check_setup,
    parse_lengths,
    parse_masses,
)
from trianglemix.analysis.check import Check, check_plan
from trianglemix.analysis.data import DataSettings, probe_samples
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.model import AnalysedModel, Precision, candidate_layers, load_model
from trianglemix.analysis.page import save_pictures
from trianglemix.analysis.plan_writer import build_plan, figures_of
from trianglemix.analysis.plots import require_matplotlib
from trianglemix.analysis.record import Record, probe_all
from trianglemix.analysis.sections import SECTIONS, LayerGradients, ProbeSample
from trianglemix.analysis.select import (
    Importance,
    importance_of,
    layers_under_threshold,
    ranked_layers,
)
from trianglemix.analysis.trials import TaskScorer, open_model
from trianglemix.command_line import (
    progress_bar,
    run_command,
    version_option,
    wide_console,
    wrong_usage,
)
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.report import check_output
from trianglemix.evaluation.run import Setup
from trianglemix.evaluation.task_list import pick_tasks
from trianglemix.exporter.layers.plan import Fingerprint, Plan

PROGRAM: Final = "trianglemix-analyze"
_SHARE: Final = 0.5
"""Without any rule given, half of the layers."""


@dataclass(frozen=True)
class _Options:
    """The command line, parsed."""

    folder: Path
    output: Path
    data: Path | None
    samples: int
    tokens: int
    device: str
    precision: Precision
    sink: int
    window: int
    last: int
    num_triangle_layers: int | None
    threshold: float | None
    max_loss: float | None
    check_samples: int
    check_tokens: int
    check_task: str
    plots: bool
    name: str | None
    block_sparse: bool
    plan: Path | None
    lengths: str
    masses: str
    block_samples: int

    @property
    def pattern(self) -> TrianglePattern:
        return TrianglePattern(self.sink, self.window, self.last)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("plan.json"))
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines of prompt and answer.")
@click.option("--samples", type=click.IntRange(1), default=24, show_default=True)
@click.option("--tokens", type=click.IntRange(16), default=2048, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, npu ...")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option(
    "--sink", type=click.IntRange(0), default=TrianglePattern.num_sink_tokens, show_default=True
)
@click.option(
    "--window",
    type=click.IntRange(1),
    default=TrianglePattern.sliding_window_size,
    show_default=True,
)
@click.option(
    "--last", type=click.IntRange(1), default=TrianglePattern.num_last_tokens, show_default=True
)
@click.option("--num-triangle-layers", type=click.IntRange(1), help="Rule: this many layers.")
@click.option(
    "--threshold",
    type=click.FloatRange(0.0, 1.0),
    help="Rule: layers of at most this share of the most important layer's gradient.",
)
@click.option(
    "--max-loss",
    type=click.FloatRange(0.0, 100.0),
    help="Rule: the most layers that lose at most this many points on the check.",
)
@click.option(
    "--check-samples", type=click.IntRange(0), default=40, show_default=True, help="0: no check."
)
@click.option("--check-tokens", type=click.IntRange(16), default=8000, show_default=True)
@click.option("--check-task", default="niah_multikey_1", show_default=True)
@click.option("--plots/--no-plots", default=True, show_default=True)
@click.option("--name", help="The model's name in the plan; the folder's without it.")
@click.option("--block-sparse", is_flag=True, help="Also: which other layers keep blocks of keys.")
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="With --block-sparse: its triangle layers stay, and only blocks are measured.",
)
@click.option("--lengths", default="4000,8000", show_default=True, help="Tokens; --block-sparse.")
@click.option("--masses", default="0.8,0.9,0.95", show_default=True, help="Of --block-sparse.")
@click.option(
    "--block-samples",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Prompts of each length; --block-sparse.",
)
@version_option
def command(**given: Any) -> None:
    """Measures which layers of the Hugging Face model in FOLDER may be triangle layers.

    With --block-sparse also which of the others may keep only the blocks of keys that hold most of
    their attention. Writes a plan for `trianglemix-export --plan`, and pictures beside it. A broken
    run goes on where it stopped when the same command is given again.
    """
    _analyze(_Options(**given), wide_console(stderr=True))


def _analyze(options: _Options, console: Console) -> None:
    _check_rules(options)
    blocks = _block_options(options) if options.block_sparse else None
    if options.plan:  # an older section goes: what a refused check leaves must not name layers
        plan, check = replace(Plan.load(options.plan), block_sparse=None), None
    else:
        plan, check = _gradients(options, console)
        plan.save(options.output)
    if blocks:
        try:
            plan = add_block_sparse(plan, blocks, console)
        except AnalysisError:
            plan.save(options.output)
            raise
        plan.save(options.output)
    console.print(f"plan: {options.output}")
    if options.plots:
        page = save_pictures(plan, options.output)
        console.print(f"pictures: {page}")
    if check and check.verdict == "rejected":
        raise AnalysisError(
            f"no set of layers lost at most {100 * check.allowed_loss:g} points on the check; the "
            "plan names the smallest set tried, but is not recommended: ask for fewer layers"
        )


def _gradients(options: _Options, console: Console) -> tuple[Plan, Check | None]:
    """A plan with its triangle layers, and what the check said of it."""
    measured = _measure(options, console)
    importance, ranked = measured.importance, measured.ranked
    rule, plans = _plans(options, importance, ranked)
    check = _check(options, plans, ranked, console) if options.check_samples else None
    chosen = check.layers if check and check.layers else plans[-1]
    plan = build_plan(measured.name, measured.fingerprint, options.pattern, ranked, chosen)
    figures = figures_of(importance, measured.settings, rule, check)
    _show(console, importance, plan.triangle_layers, check)
    return replace(plan, origin=_origin(rule, check), figures=figures), check


def _block_options(options: _Options) -> BlockOptions:
    with wrong_usage():
        lengths = parse_lengths(options.lengths)
        return BlockOptions(
            options.folder,
            options.output,
            options.data,
            lengths,
            parse_masses(options.masses),
            options.block_samples,
            options.device,
            options.precision,
            check_setup(options.check_task, options.check_tokens, options.check_samples, lengths),
            _allowed_loss(options),
        )


def _allowed_loss(options: _Options) -> float:
    return 0.05 if options.max_loss is None else options.max_loss / 100


def _check_rules(options: _Options) -> None:
    rules = [options.num_triangle_layers, options.threshold, options.max_loss]
    if sum(rule is not None for rule in rules) > 1:
        raise click.UsageError(
            "--num-triangle-layers, --threshold and --max-loss are three rules; give one"
        )
    if options.plan and not options.block_sparse:
        raise click.UsageError("--plan is for --block-sparse; give both, or neither")
    if options.plan and any(rule is not None for rule in rules[:2]):
        raise click.UsageError("--plan has its triangle layers already; give no rule for them")
    if options.max_loss is not None and not options.check_samples:
        raise click.UsageError("--max-loss needs the check; give --check-samples above 0")
    if options.check_samples:
        with wrong_usage():
            pick_tasks([options.check_task])
    check_output(options.output)
    if options.plots:
        require_matplotlib()


def _settings(options: _Options, subject: AnalysedModel) -> dict[str, Any]:
    data = DataSettings(options.samples, options.tokens, options.data)
    return {
        "model": asdict(subject.fingerprint),
        "pattern": options.pattern.as_attributes(),
        "data": data.description,
        "precision": options.precision,
        "target": "the logit of the answer's first token",
    }


@dataclass(frozen=True)
class _Measured:
    """What is left of the model when it is let go, before the check loads its own."""

    name: str
    fingerprint: Fingerprint
    settings: dict[str, Any]
    importance: Importance
    ranked: tuple[int, ...]


def _measure(options: _Options, console: Console) -> _Measured:
    subject = load_model(options.folder, options.device, options.precision)
    subject.check_tokens("--tokens", options.tokens)
    candidates = candidate_layers(subject.model.config)
    wanted = options.num_triangle_layers
    if wanted is not None and wanted > len(candidates):
        raise AnalysisError(
            f"--num-triangle-layers is {wanted}, but the model has {len(candidates)} layers that "
            "could be triangle layers; ask for fewer"
        )
    settings = _settings(options, subject)
    data = DataSettings(options.samples, options.tokens, options.data)
    samples = probe_samples(subject.tokenizer, data)
    record = Record(options.output.with_suffix(".probe.jsonl"), settings, LayerGradients)
    from trianglemix.analysis.gradients import probe  # torch, which load_model has found

    def one(sample: ProbeSample) -> LayerGradients:
        return probe(subject.model, sample, options.pattern)

    with progress_bar(console) as bar:
        task = bar.add_task("gradients", total=len(samples))
        done = probe_all(samples, one, record, lambda n: bar.update(task, completed=n))
    importance = importance_of(done)
    ranked = ranked_layers(importance, candidates)
    name = options.name or subject.name
    return _Measured(name, subject.fingerprint, settings, importance, ranked)


def _plans(
    options: _Options, importance: Importance, ranked: tuple[int, ...]
) -> tuple[str, list[tuple[int, ...]]]:
    """The rule in words, and the sets of layers it allows, largest first."""
    if options.threshold is not None:
        layers = layers_under_threshold(importance, ranked, options.threshold)
        if not layers:
            raise AnalysisError(f"no layer is under the threshold {options.threshold}; raise it")
        return f"importance at most {options.threshold:g} of the largest", [layers]
    if options.max_loss is not None:
        n = len(ranked)
        counts = sorted({max(1, n * share // 12) for share in (3, 4, 6, 8, 9, 12)}, reverse=True)
        rule = f"the most layers that lose at most {options.max_loss:g} points on the check"
        return rule, [ranked[:count] for count in counts]
    count = options.num_triangle_layers or max(1, round(_SHARE * len(ranked)))
    return f"the {count} layers of least importance", [ranked[:count]]


def _check(
    options: _Options, plans: list[tuple[int, ...]], ranked: tuple[int, ...], console: Console
) -> Check:
    model = open_model(options.folder, options.device, options.precision, options.pattern)
    tasks = pick_tasks([options.check_task])
    setup = Setup(tasks, options.check_tokens, options.check_samples)
    allowed = _allowed_loss(options)
    with progress_bar(console) as bar:
        task = bar.add_task("check", total=options.check_samples * (len(plans) + 2))
        scorer = TaskScorer(
            model, setup, lambda text: bar.update(task, advance=1, description=text)
        )
        return check_plan(plans, ranked, scorer, allowed)


def _origin(rule: str, check: Check | None) -> str:
    verdict = f"check: {check.verdict}" if check else "not checked on tasks"
    return (
        "Measured by trianglemix-analyze: mean absolute gradient of the Middle section "
        f"(TriangleMix paper, section 3); {rule}; {verdict}"
    )


def _show(
    console: Console, importance: Importance, chosen: tuple[int, ...], check: Check | None
) -> None:
    table = Table("layer", *SECTIONS, "triangle", title="mean absolute gradient by section")
    for layer, row in enumerate(importance.mean_abs):
        mark = "yes" if layer in chosen else ""
        table.add_row(str(layer), *(f"{value:.2e}" for value in row), mark)
    console.print(table)
    if importance.half_correlation is not None:
        console.print(f"rank correlation of the halves: {importance.half_correlation:.3f}")
    if check:
        table = Table("triangle layers", "right %", "against dense, points (95%)")
        table.add_row("none", f"{100 * check.dense.mean:.1f}", "")
        for name, trial in [*(("plan", t) for t in check.trials), ("control", check.control)]:
            d = trial.difference
            table.add_row(
                f"{name}: {len(trial.layers)}",
                f"{100 * trial.score.mean:.1f}",
                f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
            )
        console.print(table, f"check: {check.verdict}")


def main() -> NoReturn:
    """Entry point: every failure is one line on stderr and an exit code."""
    run_command(command, PROGRAM, "the samples done so far are kept")


if __name__ == "__main__":
    main()
