"""Runs the support matrix, or a part of it, and keeps what came of every cell.

python -m tests.sources.matrix                                   # all cells
python -m tests.sources.matrix --routes 'dynamo-*' --families llama
python -m tests.sources.matrix --block-sparse    # with such layers; the results are not kept
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from source_models.matrix import FAMILIES, ROUTES, RUNNABLE_TWINS, SOURCES
from source_models.routes.worker import REASON
from tests.sources.cell import Cell, CellPaths, Status, measure_cell

RESULTS: Final = SOURCES / "results.json"


def run_cell(route: str, family: str, *, block_sparse: bool = False) -> Cell:
    """The cell of a model under `build/sources`; it must have been made before."""
    folder = SOURCES / route / family
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: run python -m source_models.matrix first")
    if (folder / REASON).is_file():
        reason = (folder / REASON).read_text(encoding="utf-8").splitlines()[0]
        return Cell(route, family, Status.NO_SOURCE, reason)
    try:
        paths = _paths(route, family)
        return measure_cell(route, family, paths, block_sparse=block_sparse)
    except Exception as error:  # a crash is as wrong as a wrong number
        logging.exception("%s %s", route, family)
        return Cell(route, family, Status.WRONG, f"crash: {type(error).__name__}: {error}")


def _paths(route: str, family: str) -> CellPaths:
    twin = SOURCES / RUNNABLE_TWINS.get(route, route) / family
    runnable = twin != SOURCES / route / family and any(twin.glob("*.onnx"))
    return CellPaths(
        source=model_file(SOURCES / route / family),
        folder=SOURCES / "folder" / family,
        twin=model_file(twin) if runnable else None,
    )


def model_file(folder: Path) -> Path:
    """The ONNX file of a folder."""
    files = sorted(folder.glob("*.onnx"))
    assert len(files) == 1, f"{folder} holds {[file.name for file in files]}"
    return files[0]


def load_results() -> dict[str, dict[str, object]]:
    """What came of each cell when it last ran, by `route/family`."""
    if not RESULTS.is_file():
        return {}
    content: dict[str, dict[str, object]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return content


def save_result(cell: Cell) -> None:
    """Puts one cell into the results."""
    results = load_results()
    record = asdict(cell) | {"status": cell.status.value}
    results[f"{cell.route}/{cell.family}"] = record
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Prints a line per cell; the exit code is 1 if any cell is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--routes", nargs="+", default=["*"])
    parser.add_argument("--families", nargs="+", default=["*"])
    parser.add_argument("--made", action="store_true", help="leave out what is not made yet")
    parser.add_argument("--block-sparse", action="store_true", help="some layers block-sparse")
    arguments = parser.parse_args()
    wrong = False
    for family in _chosen(FAMILIES, arguments.families):
        for route in _chosen(tuple(ROUTES), arguments.routes):
            if arguments.made and not (SOURCES / route / family).is_dir():
                continue
            cell = run_cell(route, family, block_sparse=arguments.block_sparse)
            if not arguments.block_sparse:
                save_result(cell)
            wrong = wrong or cell.status is Status.WRONG
            print(f"{family:9} {route:24} {cell.status.value:9} {_figures(cell)} {cell.reason}",
                  *cell.notes, sep=" | ", flush=True)  # fmt: skip
    return int(wrong)


def _figures(cell: Cell) -> str:
    if cell.status not in (Status.EXPORTED, Status.WRONG):
        return ""
    source = "" if cell.source_error is None else f" source {cell.source_error:.1e}"
    return f"{cell.error:.1e}{source} {cell.seconds:.1f} s {'+'.join(cell.forms)}"


def _chosen(names: tuple[str, ...], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


if __name__ == "__main__":
    sys.exit(main())
