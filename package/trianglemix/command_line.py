"""What the commands have in common: `--version`, one line for a failure, the exit codes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, NoReturn

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from trianglemix.custom_ops.errors import TriangleMixError

FAILED: Final = 1
INTERRUPTED: Final = 130

version_option = click.version_option(
    package_name="trianglemix", prog_name="trianglemix", message="%(prog)s %(version)s"
)
"""Prints the version that the package was installed with."""
THREADS: Final = click.IntRange(1, 4096)
"""More threads than cores are allowed: slow, but right, and a container's count may be wrong.

ONNX Runtime starts what it is asked for: 2,000 took 0.1 GB and ran, 100,000 hung.
"""


_PIPE_WIDTH: Final = 200
_LINE_SECONDS: Final = 10.0


def wide_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """The screen; a table that goes to a file or a pipe is not squeezed.

    Texts are printed as they are: names in a model may look like rich's markup.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(
        stderr=stderr, quiet=quiet, soft_wrap=True, width=width, markup=False, highlight=False,
        emoji=False,
    )  # fmt: skip


def progress_bar(console: Console) -> Progress:
    """rich's own, whose descriptions are printed as they are; plain lines without a terminal."""
    if not console.is_terminal:
        return _PlainProgress(console=console, disable=True)
    text = TextColumn("{task.description}", markup=False)
    return Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console)


class _PlainProgress(Progress):
    """A line at the beginning, one every `_LINE_SECONDS` at most, and one at the end."""

    _printed = float("-inf")

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """As rich's; the task's description is the first line."""
        self._print(description)
        return super().add_task(description, *args, **fields)

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """As rich's, with a line where one is due."""
        task = self._tasks[task_id]
        was_finished = task.finished
        super().update(task_id, **fields)
        ends = task.finished and not was_finished
        if ends or time.monotonic() - self._printed >= _LINE_SECONDS:
            seconds = task.time_remaining
            left = f", {timedelta(seconds=round(seconds))} left" if seconds else ""
            total = "" if task.total is None else f" of {task.total:.0f}"
            self._print(f"{task.description}: {task.completed:.0f}{total}{left}")

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self.console.print(line, soft_wrap=True)


def print_warning(text: str, console: Console) -> None:
    """`warning:` and the text, on one line of the screen or more."""
    console.print(Text.assemble(("warning:", "yellow"), f" {text}"), soft_wrap=True)


def run_command(command: click.Command, program: str, left: str | None = None) -> NoReturn:
    """Runs the command and ends the process: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    What goes wrong is one line on stderr, `PROGRAM: error: ...`. `left` says what a command that
    was stopped half-way leaves behind. Whatever is wrong about the command line alone, before a
    file is opened, is wrong usage: commands raise click's errors for it.
    """
    stopped = f"; {left}" if left else ""
    try:
        code = command.main(prog_name=program, standalone_mode=False)
        sys.exit(code or 0)
    except click.UsageError as error:
        hint = f"({program} --help lists the options)"
        fail(program, f"{error.format_message()} {hint}", error.exit_code)
    except click.ClickException as error:  # a file that click opens
        fail(program, error.format_message(), FAILED)
    except (KeyboardInterrupt, click.Abort):
        fail(program, f"interrupted{stopped}", INTERRUPTED)
    except (TriangleMixError, OSError) as error:
        fail(program, str(error), FAILED)
    except MemoryError:
        fail(program, f"out of memory{stopped}", FAILED)


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Our own errors inside are about the command line alone, and end as click's do."""
    try:
        yield
    except TriangleMixError as error:
        raise click.UsageError(str(error)) from error


def fail(program: str, message: str, code: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
