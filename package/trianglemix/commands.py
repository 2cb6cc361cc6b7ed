"""Entry points of the commands. They import little: Ctrl-C is one line from the first moment on."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import NoReturn

INTERRUPTED = 130


def export() -> NoReturn:
    """`trianglemix-export`."""
    _run("export", "exporter")


def run() -> NoReturn:
    """`trianglemix-run`."""
    _run("run", "runtime")


def analyze() -> NoReturn:
    """`trianglemix-analyze`."""
    _run("analyze", "analysis")


def evaluate() -> NoReturn:
    """`trianglemix-eval`."""
    _run("eval", "evaluation")


def _run(name: str, package: str) -> NoReturn:
    """Imports the command, half a second in which nothing is written yet, and runs it."""

    def stop(number: int, frame: object) -> None:
        os.write(2, f"trianglemix-{name}: error: interrupted\n".encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, stop)
    command = import_module(f"trianglemix.{package}.cli")
    signal.signal(signal.SIGINT, before)
    command.main()
    raise AssertionError("a command ends its process")
