"""Tries every causal language model of transformers that can be made tiny; writes docs/families.md.

    python -m tools.families [--write] [family ...]

Each family runs in a child of its own, so a crash is one line of the table. Without names all run;
`--write` renews the page. The exit code is 1 when something is wrong.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils import logging as transformers_logging

from tools.families.page import write_page
from tools.families.tiny_model import LAYERS, TOKENS, families, tiny_model
from tools.families.try_family import Outcome, export_right, guarded, patch_right

RESULTS: Final = Path("build") / "families"
_LIMIT_S: Final = 180


def main(arguments: list[str]) -> int:
    """Runs the families; prints a line for each."""
    names = [name for name in arguments if not name.startswith("-")] or families()
    RESULTS.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for family in names:
        record = _in_a_child(family)
        (RESULTS / f"{family}.json").write_text(json.dumps(record))
        wrong += "wrong" in (record["export"]["status"], record["patch"]["status"])
        print(_line(family, record), flush=True)
    if "--write" in arguments:
        records = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
        write_page(records, LAYERS, TOKENS)
    return 1 if wrong else 0


def _in_a_child(family: str) -> dict[str, Any]:
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_try, args=(family, send))
    child.start()
    send.close()
    try:
        record: dict[str, Any] = receive.recv() if receive.poll(_LIMIT_S) else {}
    except EOFError:
        record = {}
    child.join(1)
    if child.is_alive():
        child.kill()
        child.join()
    if not record:
        died = asdict(Outcome("wrong", f"the process ended by itself ({child.exitcode})"))
        record = {"class": "", "export": died, "patch": died}
    return record | {"family": family, "seconds": round(time.perf_counter() - started, 1)}


def _try(family: str, send: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        model = tiny_model(family)
    except Exception as error:  # whatever the family's code raises: it is the table's reason
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        skipped = asdict(Outcome("not made", words))
        send.send({"class": "", "export": skipped, "patch": skipped})
        return
    with tempfile.TemporaryDirectory() as work:
        exported = guarded(lambda: export_right(model, Path(work)))
        patched = guarded(lambda: patch_right(model))
    outcomes = {"export": asdict(exported), "patch": asdict(patched)}
    send.send({"class": type(model).__name__, **outcomes})


def _line(family: str, record: dict[str, Any]) -> str:
    parts = (f"{record[way]['status']}: {record[way]['detail']}" for way in ("export", "patch"))
    return f"{family} [{record['seconds']} s] EXPORT {' | PATCH '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
