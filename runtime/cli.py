"""`trianglemix-run`: answers one prompt on the command line."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Final, NoReturn

import click
from rich.console import Console
from trianglemix.command_line import INTERRUPTED, THREADS, run_command, version_option
from trianglemix.runtime.backends.providers import PROVIDERS
from trianglemix.runtime.errors import FolderError, PromptError
from trianglemix.runtime.generate import Generation
from trianglemix.runtime.result import GenerationResult
from trianglemix.runtime.sampling import Sampling
from trianglemix.runtime.session import TriangleSession

PROGRAM: Final = "trianglemix-run"


@dataclass(frozen=True)
class _Options:
    """The command line, parsed."""

    folder: Path
    prompt: str | None
    prompt_file: Path | None
    chat: bool
    max_new_tokens: int
    prefill_chunk: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    provider: str
    threads: int | None
    allow_fallback: bool
    as_json: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", help="The prompt itself.")
@click.option(
    "--prompt-file", type=click.Path(allow_dash=True, path_type=Path), help="A file; - is stdin."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--prefill-chunk", type=click.IntRange(1), help="Prompt tokens per step.")
@click.option(
    "--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 is off.")
@click.option(
    "--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, show_default=True
)
@click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable.")
@click.option(
    "--provider",
    type=click.Choice(["auto", *PROVIDERS, "npu"]),
    default="auto",
    show_default=True,
    help="The operator has kernels for cpu and cuda; elsewhere it falls back, with a warning.",
)
@click.option("--threads", type=THREADS, help="CPU threads; without it one per core.")
@click.option("--allow-fallback", is_flag=True, help="Run without the native library, slowly.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and figures as JSON.")
@version_option
def run(**arguments: object) -> None:
    """Generates text with the model in FOLDER, which trianglemix-export wrote.

    The text goes to stdout as it comes, the figures to stderr. Exit codes: 0 done, 1 failed,
    2 wrong usage, 130 interrupted.
    """
    options = _Options(**arguments)  # type: ignore[arg-type]  # click has checked the types
    if (options.prompt is None) == (options.prompt_file is None):
        raise click.UsageError("give either --prompt or --prompt-file")
    text = _text(options)  # before the model is loaded
    session = TriangleSession.from_folder(
        options.folder, options.provider, options.allow_fallback, options.threads
    )
    if session.tokenizer is None:
        raise FolderError(
            "the folder has no tokenizer.json, without which text cannot be read; copy it from the "
            "source model (in Python, token ids will do)"
        )
    generation = session.stream(
        _prompt(text, options.chat, session),
        options.max_new_tokens,
        prefill_chunk=options.prefill_chunk,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed),
    )
    if options.as_json:
        click.echo(json.dumps(asdict(generation.result()), ensure_ascii=False))
    else:
        _print(generation)


def main() -> NoReturn:
    """Entry point: every failure is one line on stderr and an exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    _leave_at_once_when_interrupted()
    run_command(run, PROGRAM)


def _prompt(text: str, chat: bool, session: TriangleSession) -> str | list[int]:
    if not chat:
        return text
    assert session.tokenizer is not None
    return session.tokenizer.encode_chat([{"role": "user", "content": text}])


def _text(options: _Options) -> str:
    path = options.prompt_file
    if path is None:
        assert options.prompt is not None
        return options.prompt
    try:
        with click.open_file(str(path), encoding="utf-8") as file:
            return str(file.read())
    except OSError as error:
        raise PromptError(
            f"{path} cannot be read ({error.strerror}); give a text file, or - for stdin"
        ) from error
    except UnicodeError as error:
        raise PromptError(f"{path} is not text in UTF-8: {error}") from error


def _print(generation: Generation) -> None:
    with Console(stderr=True).status("reading the prompt"):  # shown on a terminal only
        first = next(generation)
    for token in chain([first], generation):
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    click.echo(_figures(generation.result()), err=True)


def _figures(result: GenerationResult) -> str:
    return (
        f"{result.prompt_tokens} prompt tokens, first token after {result.ttft_s:.3f} s, "
        f"{len(result.ids)} tokens at {result.tokens_per_s:.1f} per second, "
        f"{result.peak_rss_mb:.0f} MiB at most ({result.provider}, {result.kernel} kernel)"
    )


def _leave_at_once_when_interrupted() -> None:
    """Ends the process on Ctrl-C even in the middle of a long step.

    Python's own handler waits for native code to return, which a long prompt's step does late.
    The signal's wake-up pipe does not wait; nothing is being written that could be left half-done.
    """
    signal.signal(signal.SIGINT, lambda number, frame: None)  # one of the two speaks
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def watch() -> None:
        while os.read(read_end, 1)[0] != signal.SIGINT:
            pass
        os.write(sys.stderr.fileno(), f"\n{PROGRAM}: error: interrupted\n".encode())
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
