"""`trianglemix-eval`: accuracy and time to first token of a model, beside another one's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from rich.console import Console
from trianglemix.command_line import (
    THREADS,
    print_warning,
    progress_bar,
    run_command,
    version_option,
    wide_console,
    wrong_usage,
)
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.huggingface import (
    HuggingFaceModel,
    HuggingFaceOptions,
    shape_of_folder,
)
from trianglemix.evaluation.model import Loader
from trianglemix.evaluation.page import save_page
from trianglemix.evaluation.report import (
    Comparison,
    check_output,
    drops_nothing,
    save_json,
    table_of,
    warnings_of,
)
from trianglemix.evaluation.run import ModelRun, Setup, compare, run_model
from trianglemix.evaluation.task_list import all_tasks, pick_tasks
from trianglemix.exporter.layers.plan import Plan
from trianglemix.exporter.options import BlockRequest, parse_layers
from trianglemix.manifest.manifest import FILE_NAME as MANIFEST
from trianglemix.runtime.backends.providers import PROVIDERS

PROGRAM: Final = "trianglemix-eval"


@dataclass(frozen=True)
class _Options:
    """The command line, parsed."""

    folder: Path
    against: Path | None
    output: Path
    tasks: tuple[str, ...]
    tokens: int
    samples: int
    seed: int
    provider: str
    threads: int | None
    device: str
    dtype: str
    plan: Path | None
    layers: str | None
    block_sparse_layers: str | None
    mass: float | None
    min_length: int | None

    @property
    def choice(self) -> list[str]:
        """The options that choose layers of a Hugging Face model, those that were given."""
        names = ("plan", "layers", "block_sparse_layers", "mass", "min_length")
        return [name for name in names if getattr(self, name) is not None]


def _list_tasks(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        for task in all_tasks().values():
            click.echo(f"{task.name:18} {task.description}")
        context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The baseline's folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("evaluation.json"))
@click.option("--tasks", help="Comma-separated names; all thirteen without it.", default="")
@click.option("--list-tasks", is_flag=True, is_eager=True, expose_value=False, callback=_list_tasks)
@click.option("--tokens", type=click.IntRange(64), default=4096, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The first.")
@click.option(
    "--provider",
    type=click.Choice(["auto", *PROVIDERS, "npu"]),
    default="auto",
    show_default=True,
    help="Of exported folders.",
)
@click.option("--threads", type=THREADS, help="Of exported folders; without it one per core.")
@click.option("--device", default="cpu", show_default=True, help="Of Hugging Face folders.")
@click.option("--dtype", default="auto", show_default=True, help="Of Hugging Face folders.")
@click.option("--plan", type=click.Path(path_type=Path), help="Of a Hugging Face FOLDER.")
@click.option("--layers", help="Of a Hugging Face FOLDER: 4,6,9-13.")
@click.option(
    "--block-sparse-layers",
    show_default="the plan's",
    help="Of a Hugging Face FOLDER: 0-3,5; none switches those of --plan off.",
)
@click.option(
    "--mass",
    type=click.FloatRange(0, 1, min_open=True),
    show_default="the plan's, else 0.95",
    help="Of block-sparse layers: the share of the attention to keep.",
)
@click.option(
    "--min-length",
    type=click.IntRange(0),
    show_default="the plan's, else 4096",
    help="Of block-sparse layers: prompts (tokens) that they still read densely.",
)
@version_option
def command(tasks: str, **given: Any) -> None:
    """Asks the model in FOLDER the tasks, and the one of --against the same samples.

    FOLDER and --against are folders written by trianglemix-export, or Hugging Face folders, which
    run in PyTorch; the latter are dense, except for FOLDER with --plan, --layers or
    --block-sparse-layers. Without --against such a FOLDER is compared with itself, dense.
    """
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    _evaluate(_Options(tasks=names, **given), wide_console(stderr=True))


def _evaluate(options: _Options, console: Console) -> None:
    if options.plan is not None and options.layers is not None:
        raise click.UsageError("--plan and --layers name layers in two ways; give one")
    with wrong_usage():
        setup = Setup(pick_tasks(options.tasks), options.tokens, options.samples, options.seed)
        named = parse_layers(options.layers) if options.layers is not None else ()
        blocks = _block_request(options)
    check_output(options.output)
    chosen = _hugging_face_layers(options, named, blocks)
    if chosen.block_sparse_layers and drops_nothing(chosen.rule, setup.tokens):
        print_warning(
            f"block-sparse layers will drop nothing of prompts of up to {setup.tokens} tokens: "
            "give more --tokens, or a smaller --min-length or --mass",
            console,
        )
    replaced = chosen.triangle_layers or chosen.block_sparse_layers
    baseline = options.against or (options.folder if replaced else None)
    models = [(options.folder.resolve().name, _loader(options.folder, options, chosen))]
    if baseline:
        dense = HuggingFaceOptions(options.device, options.dtype)
        name = baseline.resolve().name if options.against else "dense"
        models.insert(0, (name, _loader(baseline, options, dense)))
    if replaced and not options.against:
        models[1] = (_name_of(chosen), models[1][1])
    runs = _run(models, setup, console)
    against = runs[0] if baseline else None
    comparison = Comparison(setup, against, runs[-1], compare(runs[0], runs[-1]))
    save_json(comparison, options.output)
    page = options.output.with_suffix(".html")
    save_page(comparison, page)
    wide_console().print(table_of(comparison))
    for text in warnings_of(comparison):
        print_warning(text, console)
    console.print(f"answers: {options.output}; page: {page}", soft_wrap=True)


def _run(models: list[tuple[str, Loader]], setup: Setup, console: Console) -> list[ModelRun]:
    """The baseline last: a model that cannot have triangle layers is refused before it runs."""
    total = len(models) * len(setup.tasks) * setup.samples
    with progress_bar(console) as bar:
        task = bar.add_task("loading", total=total)
        runs = [
            run_model(name, load, setup, lambda text: bar.update(task, advance=1, description=text))
            for name, load in reversed(models)
        ]
    return runs[::-1]


def _loader(folder: Path, options: _Options, chosen: HuggingFaceOptions) -> Loader:
    if (folder / MANIFEST).is_file():
        from trianglemix.evaluation.onnx_model import OnnxModel

        return partial(OnnxModel, folder, options.provider, options.threads)
    if (folder / "config.json").is_file():
        return partial(HuggingFaceModel, folder, chosen)
    raise ConfigurationError(
        f"{folder} is neither a folder of trianglemix-export ({MANIFEST}) nor a Hugging Face model "
        "(config.json); give one of the two"
    )


def _block_request(options: _Options) -> BlockRequest:
    text, layers = options.block_sparse_layers, None
    if text is not None:
        layers = () if text == "none" else parse_layers(text, "--block-sparse-layers")
    return BlockRequest(layers, options.mass, options.min_length)


def _hugging_face_layers(
    options: _Options, layers: tuple[int, ...], blocks: BlockRequest
) -> HuggingFaceOptions:
    plain = HuggingFaceOptions(options.device, options.dtype)
    if not options.choice:
        return plain
    if (options.folder / MANIFEST).is_file():
        given = " and ".join(f"--{name.replace('_', '-')}" for name in options.choice)
        raise ConfigurationError(
            f"{given}: for a Hugging Face folder, but the layers of {options.folder} were chosen "
            "when it was exported; leave them out"
        )
    shape = shape_of_folder(options.folder)
    pattern, section = plain.pattern, None
    if options.plan is not None:
        plan = Plan.load(options.plan)
        plan.check_fits(shape)
        layers = plan.triangle_layers or plan.layers_by_importance
        pattern, section = plan.pattern or pattern, plan.block_sparse
    sparse = blocks.layers if blocks.layers is not None else section.layers if section else ()
    for option, named in (("--layers", layers), ("--block-sparse-layers", sparse)):
        if named and max(named) >= shape.num_layers:
            raise ConfigurationError(
                f"{option} names layer {max(named)}, but the model has {shape.num_layers} layers "
                f"(0-{shape.num_layers - 1})"
            )
    if blocks.changes_rule and not sparse:
        raise ConfigurationError(
            "--mass and --min-length are of block-sparse layers, of which there are none; name "
            "some with --block-sparse-layers, or give a plan that does"
        )
    rule = blocks.over(section.rule if section else plain.rule)
    return replace(
        plain, triangle_layers=layers, pattern=pattern, block_sparse_layers=sparse, rule=rule
    )


def _name_of(chosen: HuggingFaceOptions) -> str:
    counts = (
        (len(chosen.triangle_layers), "triangle"),
        (len(chosen.block_sparse_layers), "block-sparse"),
    )
    return " and ".join(f"{count} {kind}" for count, kind in counts if count) + " layers"


def main() -> NoReturn:
    """Entry point: every failure is one line on stderr and an exit code."""
    run_command(command, PROGRAM, "nothing was written")


if __name__ == "__main__":
    main()
