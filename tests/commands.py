"""Runs a command as its user does, in this process: its exit code and what it printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import NoReturn

import pytest


@dataclass(frozen=True)
class Finished:
    """`out` and `err` are the two streams."""

    code: int
    out: str
    err: str


def run_main(main: Callable[[], NoReturn], *arguments: object) -> Finished:
    """Calls the entry point of a command with this command line."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return Finished(int(stop.value.code or 0), out.getvalue(), err.getvalue())
