"""What the four commands have in common: the version, failures of one line, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE
from typing import Final, NoReturn

import click
import pytest
from rich.table import Table
from trianglemix.analysis import cli as analyze
from trianglemix.command_line import print_warning, progress_bar, run_command, wide_console
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation import cli as evaluate
from trianglemix.exporter import cli as export
from trianglemix.runtime import cli as run

from tests.commands import run_main

ROOT: Final = Path(__file__).resolve().parents[1]
MAINS: Final[dict[str, Callable[[], NoReturn]]] = {
    "trianglemix-export": export.main,
    "trianglemix-run": run.main,
    "trianglemix-analyze": analyze.main,
    "trianglemix-eval": evaluate.main,
}
WRONG_USAGE: Final = [
    "trianglemix-export x -o y --sink -1",
    "trianglemix-export x -o y --window 0",
    "trianglemix-export x -o y --last 0",
    "trianglemix-export x -o y --layers 3-",
    "trianglemix-export x -o y --num-triangle-layers 0",
    "trianglemix-export x -o y --start-layer -1",
    "trianglemix-run x --prompt a --threads many",
    "trianglemix-run x --prompt a --threads 100000",
    "trianglemix-run x --prompt a --provider tpu",
    "trianglemix-run x --prompt a --prompt-file b",
    "trianglemix-analyze x --sink -1",
    "trianglemix-analyze x --window 0",
    "trianglemix-analyze x --last 0",
    "trianglemix-analyze x --check-task chess",
    "trianglemix-analyze x --num-triangle-layers 1 --threshold 0.5",
    "trianglemix-analyze x --max-loss 1 --check-samples 0",
    "trianglemix-eval x --tasks chess",
    "trianglemix-eval x --layers 3-",
    "trianglemix-eval x --layers 3 --plan y",
    "trianglemix-eval x --threads 100000",
    "trianglemix-eval x --provider tpu",
]
FAILURES: Final = {
    "trianglemix-export nowhere -o y": "nowhere does not exist",
    "trianglemix-run nowhere --prompt a": "nowhere is no folder with a manifest.json; give one",
    "trianglemix-run nowhere --prompt-file missing.txt": "missing.txt cannot be read",
    "trianglemix-run nowhere --prompt-file .": ". cannot be read",
    "trianglemix-analyze nowhere --no-plots": "nowhere has no tokenizer.json",
    "trianglemix-analyze nowhere --no-plots -o none/plan.json": "folder of none/plan.json",
    "trianglemix-eval nowhere": "nowhere is neither",
    "trianglemix-eval nowhere --layers 1": "nowhere has no config.json",
    "trianglemix-eval nowhere -o none/result.json": "folder of none/result.json",
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the command lines here name exists, and Ctrl-C stays pytest's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_leave_at_once_when_interrupted", lambda: None)


def _fails(line: str, code: int) -> str:
    """The one line on stderr without its prefix; nothing on stdout, nothing written."""
    program, *arguments = line.split()
    finished = run_main(MAINS[program], *arguments)
    assert finished.code == code, finished
    assert finished.out == ""
    assert finished.err.count("\n") == 1, finished.err
    assert not list(Path().iterdir())
    prefix = f"{program}: error: "
    assert finished.err.startswith(prefix)
    return finished.err.removeprefix(prefix)


@pytest.mark.parametrize("program", MAINS)
def test_the_version_is_the_packages(program: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version("trianglemix") == project["version"]
    finished = run_main(MAINS[program], "--version")
    assert (finished.code, finished.err) == (0, "")
    assert finished.out == f"trianglemix {project['version']}\n"


@pytest.mark.parametrize("program", MAINS)
def test_any_command_without_its_argument(program: str) -> None:
    for wrong in ("", " --nonsense", " x y z"):
        line = _fails(program + wrong, 2)
        assert line.endswith(f"({program} --help lists the options)\n")


@pytest.mark.parametrize("line", WRONG_USAGE)
def test_wrong_usage_is_two(line: str) -> None:
    assert "--help lists the options" in _fails(line, 2)


@pytest.mark.parametrize(("line", "reason"), FAILURES.items())
def test_failures_are_one(line: str, reason: str) -> None:
    assert reason in _fails(line, 1)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigurationError("two\n lines"), 1, "two lines"),
        (PermissionError(13, "Permission denied", "x"), 1, "[Errno 13] Permission denied: 'x'"),
        (MemoryError(), 1, "out of memory; half is left"),
        (KeyboardInterrupt(), 130, "interrupted; half is left"),
        (click.UsageError("so not"), 2, "so not (p --help lists the options)"),
    ],
)
def test_what_ends_a_command(error: BaseException, code: int, line: str) -> None:
    @click.command()
    def command() -> None:
        raise error

    finished = run_main(lambda: run_command(command, "p", "half is left"))
    assert finished.code == code
    assert finished.err.strip() == f"p: error: {line}"


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3, 0.5])
def test_an_interrupt_while_the_command_is_imported(delay: float) -> None:
    code = "from trianglemix import commands; print('on', flush=True); commands.export()"
    command = [sys.executable, "-c", code, "nowhere", "-o", "out"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert len(error.splitlines()) == 1, error
    assert error.startswith("trianglemix-export: error: ")
    assert process.returncode == (130 if "interrupted" in error else 1)


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a[/b] [bold]c[/bold] :smile: 5"
    table = Table(name, title=name)
    table.add_row(name)
    wide_console().print(table)
    print_warning(name, wide_console())
    with progress_bar(wide_console()) as bar:
        bar.add_task(name, total=1)
    assert capsys.readouterr().out.count(name) >= 4
