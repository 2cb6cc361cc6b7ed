"""One process of `source_models.matrix`: makes models of one route, each whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final


class NoSourceError(Exception):
    """The exporter's own words on why it makes no model of a family."""


Make = Callable[[str, Path, Path], None]
"""`make(route, family folder, empty target folder)`."""
REASON: Final = "no_source.txt"


def work(make: Make) -> int:
    """Runs the jobs of the command line: `route folder target` thrice and again.

    A job that fails leaves a target folder that holds only the reason: a route that does not
    take a family is a finding, and need not be tried again.
    """
    warnings.simplefilter("ignore")
    jobs = sys.argv[1:]
    for route, folder, target in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        _work_one(make, route, Path(folder), Path(target))
    return 0


def _work_one(make: Make, route: str, folder: Path, target: Path) -> None:
    temporary = target.with_name(f"{target.name}~{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        make(route, folder, temporary)
    except Exception as error:  # whatever an exporter throws is the reason
        shutil.rmtree(temporary)
        temporary.mkdir()
        reason = _one_line(error).replace(str(folder), folder.name)
        (temporary / REASON).write_text(f"{reason}\n", encoding="utf-8")
        (temporary / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        print(f"{route} {target.name}: no source: {reason}", flush=True)
    else:
        print(f"{route} {target.name}: made", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)


def _one_line(error: Exception) -> str:
    """The error's first sentence."""
    name = "" if isinstance(error, NoSourceError) else f"{type(error).__name__}: "
    lines = f"{name}{error}".strip().splitlines() or [type(error).__name__]
    return re.split(r"(?<=[\w`])\. ", lines[0])[0][:240]
