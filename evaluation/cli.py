"""`trianglemix-eval`: accuracy and time to first token of a model, beside another one's."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
from trianglemix.evaluation.comparison import Comparison, compare
from trianglemix.evaluation.entrants import (
    URL,
    Entrant,
    Serving,
    dense_beside,
    is_exported,
    of_endpoint,
    of_folder,
)
from trianglemix.evaluation.huggingface import HuggingFaceOptions
from trianglemix.evaluation.layer_choice import LayerChoice, LayerOptions
from trianglemix.evaluation.outcome import ModelRun
from trianglemix.evaluation.page import save_page
from trianglemix.evaluation.record import Record
from trianglemix.evaluation.report import (
    check_output,
    drops_nothing,
    save_json,
    table_of,
    warnings_of,
)
from trianglemix.evaluation.run import Setup, run_models
from trianglemix.evaluation.task_list import all_tasks, pick_tasks
from trianglemix.runtime.backends.providers import PROVIDERS

PROGRAM: Final = "trianglemix-eval"


@dataclass(frozen=True)
class _Options:
    """The command line, parsed."""

    folder: Path | None
    served: str | None
    served_model: str | None
    against: str | None
    against_model: str | None
    tokenizer: Path | None
    timeout: float
    output: Path
    tasks: tuple[str, ...]
    tokens: int
    samples: int
    seed: int
    one_at_a_time: bool
    provider: str
    threads: int | None
    device: str
    dtype: str
    layers: LayerOptions


def _list_tasks(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        for task in all_tasks().values():
            click.echo(f"{task.name:18} {task.description}")
        context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--served", metavar="URL", help="In place of FOLDER: http://localhost:8000/v1.")
@click.option("--served-model", metavar="NAME", help="Of --served, where that has several.")
@click.option("--against", metavar="FOLDER|URL", help="The baseline: a folder, or an endpoint.")
@click.option("--against-model", metavar="NAME", help="Of an endpoint --against.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Of served models: a folder; without it the folder that is served, if it is here.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Of served models: seconds of silence.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("evaluation.json"))
@click.option("--tasks", help="Comma-separated names; all thirteen without it.", default="")
@click.option("--list-tasks", is_flag=True, is_eager=True, expose_value=False, callback=_list_tasks)
@click.option("--tokens", type=click.IntRange(64), default=4096, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The first.")
@click.option(
    "--one-at-a-time",
    is_flag=True,
    help="One model in memory; its peak is told, times of first tokens are not compared.",
)
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

    --served, in place of FOLDER, and --against also take the base URL of an OpenAI endpoint, which
    must take prompts of token ids, as vLLM does. Its key is that of OPENAI_API_KEY.

    Answers are kept beside the output until all are there: the same command goes on where it was
    stopped.
    """
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    layers = LayerOptions(**{field.name: given.pop(field.name) for field in fields(LayerOptions)})
    _evaluate(_Options(tasks=names, layers=layers, **given), wide_console(stderr=True))


def _evaluate(options: _Options, console: Console) -> None:
    with wrong_usage():
        setup = Setup(pick_tasks(options.tasks), options.tokens, options.samples, options.seed)
        choice = options.layers.parsed()
        _check_places(options)
    check_output(options.output)
    chosen = _chosen_layers(options, choice)
    if chosen.block_sparse_layers and drops_nothing(chosen.rule, setup.tokens):
        print_warning(
            f"block-sparse layers will drop nothing of prompts of up to {setup.tokens} tokens: "
            "give more --tokens, or a smaller --min-length or --mass",
            console,
        )
    entrants = _entrants(options, chosen)
    runs = _run(entrants, setup, options, console)
    against = runs[0] if len(runs) > 1 else None
    rows = compare(runs[0], runs[-1], together=not options.one_at_a_time)
    comparison = Comparison(setup, against, runs[-1], rows)
    save_json(comparison, options.output)
    page = options.output.with_suffix(".html")
    save_page(comparison, page)
    for record, _ in _parts(entrants, setup, options):
        record.remove()
    wide_console().print(table_of(comparison))
    for text in warnings_of(comparison):
        print_warning(text, console)
    console.print(f"answers: {options.output}; page: {page}", soft_wrap=True)


def _check_places(options: _Options) -> None:
    """Raises ConfigurationError where options do not go together, or with nothing to ask."""
    if (options.folder is None) == (options.served is None):
        raise ConfigurationError("give one model to ask: a FOLDER, or --served URL")
    if options.served and options.layers.given:
        raise ConfigurationError(
            f"{' and '.join(options.layers.given)}: for a Hugging Face folder, but the layers of "
            "a served model are chosen by its server; leave them out"
        )
    if options.served and not URL.match(options.served):
        raise ConfigurationError(
            f"--served is {options.served!r}, but must be an address, such as "
            "http://localhost:8000/v1"
        )
    against = options.against is not None and URL.match(options.against) is not None
    for option, value, is_served in (
        ("--served-model", options.served_model, bool(options.served)),
        ("--against-model", options.against_model, against),
        ("--tokenizer", options.tokenizer, against or bool(options.served)),
    ):
        if value is not None and not is_served:
            raise ConfigurationError(f"{option} is of a served model, of which there is none")


def _entrants(options: _Options, chosen: HuggingFaceOptions) -> list[Entrant]:
    """The baseline, if there is one, and the model in question."""
    plain = HuggingFaceOptions(options.device, options.dtype)
    replaced = chosen.triangle_layers or chosen.block_sparse_layers
    if options.folder and options.against is None and replaced:
        return list(dense_beside(options.folder, chosen))
    serving = Serving(options.tokenizer, options.tokens, options.timeout)

    def at(place: str | Path, layers: HuggingFaceOptions, name: str | None, option: str) -> Entrant:
        if isinstance(place, str) and URL.match(place):
            return of_endpoint(place, name, option, serving)
        return of_folder(Path(place), options.provider, options.threads, layers)

    ours = options.served or options.folder
    assert ours is not None
    found = [at(ours, chosen, options.served_model, "--served-model")]
    if options.against is not None:
        found.insert(0, at(options.against, plain, options.against_model, "--against-model"))
    return found


def _run(
    entrants: list[Entrant], setup: Setup, options: _Options, console: Console
) -> list[ModelRun]:
    total = len(entrants) * len(setup.tasks) * setup.samples
    runs: list[ModelRun] = []
    with progress_bar(console) as bar:
        task = bar.add_task("loading", total=total)
        for record, models in _parts(entrants, setup, options):
            if before := len(record.load()):
                console.print(f"{record.path} holds {before} samples that were asked before")
            runs += run_models(
                [(model.name, model.load) for model in models],
                setup,
                lambda text: bar.update(task, advance=1, description=text),
                record,
            )
    return runs[::-1] if options.one_at_a_time else runs


def _parts(
    entrants: list[Entrant], setup: Setup, options: _Options
) -> list[tuple[Record, list[Entrant]]]:
    """Models that are held at one time, and where their answers are kept until all are there.

    The baseline is loaded last: a model that cannot have triangle layers is refused before it runs.
    """
    parts = [[model] for model in entrants[::-1]] if options.one_at_a_time else [entrants]
    found = []
    for number, models in enumerate(parts):
        settings = {"tokens": setup.tokens, "models": [dict(model.identity) for model in models]}
        part = f"-{number}" if len(parts) > 1 else ""
        path = options.output.with_name(f"{options.output.stem}-unfinished{part}.jsonl")
        found.append((Record(path, settings), models))
    return found


def _chosen_layers(options: _Options, choice: LayerChoice) -> HuggingFaceOptions:
    plain = HuggingFaceOptions(options.device, options.dtype)
    if not options.layers.given or options.folder is None:
        return plain
    if is_exported(options.folder):
        raise ConfigurationError(
            f"{' and '.join(options.layers.given)}: for a Hugging Face folder, but the layers of "
            f"{options.folder} were chosen when it was exported; leave them out"
        )
    return choice.of_folder(options.folder, plain)


def main() -> NoReturn:
    """Entry point: every failure is one line on stderr and an exit code."""
    run_command(command, PROGRAM, "answers so far are kept: the same command goes on")


if __name__ == "__main__":
    main()
