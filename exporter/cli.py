"""`trianglemix-export`: the command line of the exporter."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from trianglemix.command_line import run_command, version_option, wide_console, wrong_usage
from trianglemix.exporter.attention.sites import Sites
from trianglemix.exporter.inspection import inspect_model, print_inspection
from trianglemix.exporter.options import (
    BlockRequest,
    ExportOptions,
    LayerRequest,
    PatternRequest,
    parse_layers,
)
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_targets
from trianglemix.exporter.report.print_report import print_near_misses, print_report

PROGRAM: Final = "trianglemix-export"
_TARGETS: Final = all_targets()
_SUMMARIES: Final = "; ".join(f"{name}: {target.summary}" for name, target in _TARGETS.items())


def _of_targets(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that belong to one target each."""
    options = [option for target in _TARGETS.values() for option in target.options]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--target",
    type=click.Choice(sorted(_TARGETS)),
    default="cpu",
    show_default=True,
    help=f"What will run the model. {_SUMMARIES}.",
)
@click.option(
    "--start-layer", type=click.IntRange(0), help="Triangle layers: this one and all deeper ones."
)
@click.option(
    "--layers",
    help="Triangle layers, as in 5,7,10,15-35; none leaves block-sparse layers alone.",
)
@click.option(
    "--num-triangle-layers",
    "count",
    type=click.IntRange(1),
    help="Triangle layers: this many, the least important by the plan or the deepest.",
)
@click.option("--plan", type=click.Path(path_type=Path), help="Layer plan (JSON).")
@click.option(
    "--sink",
    type=click.IntRange(0),
    show_default="the plan's, else 8",
    help="First keys that every row keeps.",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    show_default="the plan's, else 512",
    help="Keys that a row keeps, itself the last.",
)
@click.option(
    "--last",
    type=click.IntRange(1),
    show_default="the plan's, else 128",
    help="Dense rows at the prompt's end.",
)
@click.option(
    "--block-sparse-layers",
    "block_layers",
    show_default="the plan's",
    help="Block-sparse layers, as in 0-3,5; none switches those of a plan off.",
)
@click.option(
    "--mass",
    type=click.FloatRange(0, 1, min_open=True),
    show_default="the plan's, else 0.95",
    help="Share of the attention that block-sparse layers keep at least.",
)
@click.option(
    "--min-length",
    type=click.IntRange(0),
    show_default="the plan's, else 4096",
    help="Prompts (tokens) that block-sparse layers still read densely.",
)
@click.option(
    "--dense", is_flag=True, help="Export the dense twin, GroupQueryAttention throughout."
)
@click.option("--last-token-logits", is_flag=True, help="Logits of each row's last token only.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16"]),
    default="auto",
    show_default=True,
    help="Type of a Hugging Face folder's weights; auto keeps theirs where the target can.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "link"]),
    default="copy",
    show_default=True,
    help="External weights: files of their own, or hard links of the source's.",
)
@click.option(
    "--prompt-length",
    type=click.IntRange(min=1),
    help="Prompt length (tokens) of the predicted gain; 32768, or the context if that is less.",
)
@_of_targets
@click.option("--dry-run", is_flag=True, help="Report what would be done; write nothing.")
@click.option("--inspect", is_flag=True, help="Print what the model holds; change nothing.")
@click.option("--explain", is_flag=True, help="List what looked like attention and was not taken.")
@click.option("--verify", is_flag=True, help="Run source and export and compare their logits.")
@click.option("--atol", type=click.FloatRange(min=0), help="Largest error that --verify allows.")
@click.option(
    "--verify-tokens",
    type=click.IntRange(min=2),
    show_default="2048",
    help="How far --verify compares, where the context allows.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors, of --inspect the verdict.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
)
@version_option
@click.pass_context
def command(context: click.Context, /, **_: object) -> None:
    """Export an ONNX LLM, or a Hugging Face folder, with TriangleAttention in some of its layers.

    SOURCE is a model.onnx, a folder that holds one, or a Hugging Face folder. Exit codes: 0 done,
    1 refused or failed, 2 wrong usage, 130 interrupted.
    """
    given = context.params
    quiet = bool(given["quiet"])
    console = wide_console(quiet=quiet)
    if any(target.runs_alone(given, console) for target in _TARGETS.values()):
        return
    if given["inspect"]:
        _check_alone(context)
        print_inspection(inspect_model(given["source"]), wide_console(), quiet=quiet)
        return
    options = _options(given)
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    level = given["log_level"].upper()
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    bars = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with _Screen(bars, console if given["explain"] else None) as screen:
        report = export(options, screen)
    print_report(report, console)
    _TARGETS[options.target].show(report, options, console)
    if not options.dry_run:
        console.print(f"written: {options.output}")


_WITH_INSPECT: Final = ("source", "inspect", "explain", "quiet", "log_level")


def _check_alone(context: click.Context) -> None:
    """Raises click.UsageError for an option that --inspect has no use for."""
    for parameter in context.command.params:
        told = context.get_parameter_source(parameter.name or "")
        if told is click.core.ParameterSource.COMMANDLINE and parameter.name not in _WITH_INSPECT:
            raise click.UsageError(
                f"--inspect changes nothing, so {parameter.opts[0]} has no effect: leave one out"
            )


def _options(given: dict[str, Any]) -> ExportOptions:
    """The options, checked against each other.

    Raises:
        click.UsageError: options that exclude each other, a missing one, an unreadable list.
    """
    _check_choice(given)
    settings = {name: target.read_settings(given) for name, target in _TARGETS.items()}
    only_told = _TARGETS[given["target"]].tells_without_output(given)
    dry_run = given["dry_run"] or (only_told and given["output"] is None)
    if dry_run and given["verify"]:
        raise click.UsageError("--verify runs what was written: leave --dry-run out, add -o FOLDER")
    for name in ("atol", "verify_tokens"):
        if given[name] is not None and not given["verify"]:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} says how --verify compares: add --verify")
    if given["output"] is None and not dry_run:
        raise click.UsageError("no output folder: add -o FOLDER (or --dry-run)")
    return ExportOptions(
        source=given["source"],
        output=given["output"],
        target=given["target"],
        layers=LayerRequest(
            given["start_layer"],
            _listed(given["layers"], "--layers"),
            given["count"],
            given["plan"],
        ),
        pattern=PatternRequest(given["sink"], given["window"], given["last"]),
        blocks=BlockRequest(
            _listed(given["block_layers"], _BLOCKS["block_layers"]),
            given["mass"],
            given["min_length"],
        ),
        dense=given["dense"],
        last_token_logits=given["last_token_logits"],
        weights=given["weights"],
        prompt_length=given["prompt_length"],
        dry_run=dry_run,
        verify=given["verify"],
        atol=given["atol"],
        verify_tokens=given["verify_tokens"] or 2048,
        force=given["force"],
        dtype=given["dtype"],
        settings=settings[given["target"]],
    )


class _Screen:
    """Shows the stages of the export as a progress bar that appears after a second."""

    def __init__(self, console: Console, explain: Console | None) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=None)
        self._explain = explain

    def __enter__(self) -> _Screen:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        self._progress.update(self._task, description=name, completed=0, total=None)

    def progress(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def sites(self, sites: Sites) -> None:
        if self._explain is not None:
            print_near_misses(sites.near_misses, self._explain)


_CHOICES: Final = {
    "start_layer": "--start-layer",
    "layers": "--layers",
    "count": "--num-triangle-layers",
    "plan": "--plan",
}


def _check_choice(given: dict[str, Any]) -> None:
    """One way of choosing layers; a plan may be cut to a number of layers."""
    chosen = [option for name, option in _CHOICES.items() if given[name] is not None]
    if len(chosen) > 1 and chosen != ["--num-triangle-layers", "--plan"]:
        raise click.UsageError(f"{' and '.join(chosen)} each choose the layers: give one of them")
    if given["dense"] and chosen:
        raise click.UsageError(f"--dense has no triangle layers: leave {chosen[0]} out")
    blocks = [option for name, option in _BLOCKS.items() if given[name] is not None]
    if given["dense"] and blocks:
        raise click.UsageError(f"--dense has no block-sparse layers: leave {blocks[0]} out")
    if given["block_layers"] == _NO_LAYERS and len(blocks) > 1:
        raise click.UsageError(f"without block-sparse layers {blocks[1]} has no effect")


_NO_LAYERS: Final = "none"
_BLOCKS: Final = {
    "block_layers": "--block-sparse-layers",
    "mass": "--mass",
    "min_length": "--min-length",
}


def _listed(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None or text == _NO_LAYERS:
        return None if text is None else ()
    with wrong_usage():
        return parse_layers(text, option)


def main() -> NoReturn:
    """Runs the command; exits with 0 done, 1 refused or failed, 2 wrong usage, 130 stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(command, PROGRAM, "nothing was written")


if __name__ == "__main__":
    main()
