"""Exports every model of the source matrix for Ascend, lints its graphs, compares their numbers.

python -m tests.exporter.targets.ascend.source_matrix          # all of build/sources; minutes
python -m tests.exporter.targets.ascend.source_matrix --routes 'genai-*' --families llama

What came of each cell is kept in build/sources/ascend.json; the table of docs/ascend.md is made
of it by `python -m tests.exporter.targets.ascend.source_matrix --table`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import numpy as np
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import (
    ExportOptions,
    LayerRequest,
    PatternRequest,
)
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.targets.ascend.lint import lint_file
from trianglemix.exporter.targets.ascend.lint_model import LengthAxes, Severity
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.exporter.targets.ascend.soc import find_soc
from trianglemix.runtime.session import TriangleSession

from source_models.matrix import FAMILIES, ROUTES, SOURCES
from source_models.routes.worker import REASON
from tests.exporter.targets.ascend.exported import Silent, last_logits, prompt

CHUNK, SLOTS, LAST = 32, 1024, 16
LENGTHS: Final = (3, 47, 150)
RESULTS: Final = SOURCES / "ascend.json"
PAGE: Final = Path(__file__).resolve().parents[4] / "docs" / "ascend.md"
_PATTERN: Final = PatternRequest(sink=4, window=24, last=LAST)
_TOLERANCE: Final = {"float32": 2e-4, "float16": 2e-2}
_SOC: Final = "Ascend910B3"
_PLAIN: Final = (
    (r" ?\((?:and \d+ more; )?--explain lists them\)", ""),
    (r" \(its inputs: .*?\);", ";"),
    (r"the model in /\S+:", "the model:"),
    (r"attention at node \S+: ", ""),
    (r"the shape of \S+,", "the shape of a value,"),
    (r"node \S+ is", "a node is"),
    (r"node \S+ \(", "a node ("),
)
"""What differs from cell to cell in a reason that is the same."""


@dataclass(frozen=True)
class Cell:
    """What came of one model: `clean`, `refused`, `wrong` or `not made`.

    `error` is the largest difference to the CPU export, as a share of the largest logit;
    `findings` are the linter's warnings and errors by rule.
    """

    status: str
    reason: str = ""
    error: float = 0.0
    findings: tuple[str, ...] = ()


def measure(path: Path, place: Path) -> Cell:
    """Exports one ONNX file or Hugging Face folder; `place` is an empty folder."""
    try:
        dense = _export(path, place / "cpu", "cpu")
    except ExportError as error:
        return Cell("refused", f"by every target: {error}")
    try:
        _export(path, place / "ascend", "ascend", dense)
    except ExportError as error:
        return Cell("refused", str(error))
    findings = lint_folder(place / "ascend")
    ascend, cpu = (TriangleSession.from_folder(place / name) for name in ("ascend", "cpu"))
    worst = 0.0
    for length in LENGTHS:
        got, want = (last_logits(session, prompt(length)) for session in (ascend, cpu))
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    bad = not worst <= _TOLERANCE[ascend.manifest.cache_dtype]
    return Cell("wrong" if bad or findings else "clean", "", worst, tuple(sorted(set(findings))))


def lint_folder(folder: Path) -> list[str]:
    """Rules of every warning and error in the folder's graphs, by the strictest view of lengths."""
    return [
        finding.rule
        for file in sorted(folder.glob("*.onnx"))
        for finding in lint_file(file, find_soc(_SOC), LengthAxes(SLOTS, frozenset({2 * SLOTS})))
        if finding.severity is not Severity.NOTE
    ]


def _export(path: Path, output: Path, target: str, dense: bool = False) -> bool:
    """Every layer triangle, or the dense twin of a model that only slides; says which it was."""
    options = ExportOptions(
        path,
        output,
        target=target,
        pattern=_PATTERN,
        layers=LayerRequest() if dense else LayerRequest(start_layer=0),
        dense=dense,
        weights="copy",
        settings=AscendRequest(_SOC, CHUNK, SLOTS),
    )
    try:
        export(options, Silent())
    except ExportError as error:
        if dense or "all chosen ones slide" not in str(error):
            raise
        return _export(path, output, target, dense=True)
    return dense


def run_cell(route: str, family: str) -> Cell | None:
    """The cell of a model under build/sources, None where there is none."""
    folder = SOURCES / route / family
    if not folder.is_dir():
        return None
    if (folder / REASON).is_file():
        return Cell("not made")
    files = sorted(folder.glob("*.onnx"))
    with tempfile.TemporaryDirectory() as place:
        try:
            return measure(files[0] if files else folder, Path(place))
        except Exception as error:  # a crash is as wrong as a wrong number
            return Cell("wrong", f"crash: {type(error).__name__}: {error}")


def table(results: dict[str, Cell]) -> str:
    """A row per route with the families that pass and those that are refused; reasons below."""
    reasons: list[str] = []
    lines = [
        "| source | lint clean, numbers right | largest difference | refused |",
        "|---|---|---|---|",
    ]
    for route in ("folder", *ROUTES):
        cells = {f: results[f"{route}/{f}"] for f in FAMILIES if f"{route}/{f}" in results}
        clean = {f: cell for f, cell in cells.items() if cell.status == "clean"}
        others = {f: c for f, c in cells.items() if c.status in ("refused", "wrong")}
        if not clean and not others:
            continue
        worst = max((cell.error for cell in clean.values()), default=0.0)
        words = [f"{f} ({_number(cell, reasons)})" for f, cell in others.items()]
        lines.append(
            f"| `{route}` | {len(clean)}: {', '.join(clean) or '-'} | "
            f"{f'{worst:.0e}' if clean else '-'} | {', '.join(words) or '-'} |"
        )
    return "\n".join([*lines, "", *(f"{n}. {text}" for n, text in enumerate(reasons, 1))])


def _number(cell: Cell, reasons: list[str]) -> str:
    reason = cell.reason or f"WRONG: {cell.error:.0e}, {', '.join(cell.findings)}"
    for pattern, plain in _PLAIN:
        reason = re.sub(pattern, plain, reason)
    reason = reason.strip()
    if reason not in reasons:
        reasons.append(reason)
    return str(reasons.index(reason) + 1)


def load() -> dict[str, Cell]:
    """The results so far."""
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return {key: Cell(**record) for key, record in content.items()}


def write_table() -> None:
    """Puts the table into docs/ascend.md, between its marks."""
    text, block = PAGE.read_text(encoding="utf-8"), table(load())
    marks = re.compile("(<!-- ascend sources -->\n).*?(<!-- end of ascend sources -->)", re.DOTALL)
    assert marks.search(text), f"{PAGE} has lost its marks"
    PAGE.write_text(
        marks.sub(lambda m: f"{m[1]}{block}\n{m[2]}", text),
        encoding="utf-8",
    )


def main() -> int:
    """A line per cell; the exit code is 1 if any is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--routes", nargs="+", default=["*"])
    parser.add_argument("--families", nargs="+", default=["*"])
    parser.add_argument("--table", action="store_true", help="only write docs/ascend.md")
    given = parser.parse_args()
    results = load()
    for route in () if given.table else ("folder", *ROUTES):
        for family in FAMILIES:
            patterns = ((route, given.routes), (family, given.families))
            if not all(any(fnmatch(name, p) for p in wanted) for name, wanted in patterns):
                continue
            cell = run_cell(route, family)
            if cell is None:
                continue
            results[f"{route}/{family}"] = cell
            print(f"{route:24} {family:12} {cell.status:9} {cell.error:.0e} {cell.reason}",
                  *cell.findings, flush=True)  # fmt: skip
            content = {key: asdict(value) for key, value in results.items()}
            RESULTS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    if given.table:
        write_table()
    return int(any(cell.status == "wrong" for cell in results.values()))


if __name__ == "__main__":
    sys.exit(main())
