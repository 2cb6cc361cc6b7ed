"""Writes what the last run of the support matrix found into docs/sources.md and README.md.

    python -m tests.sources.matrix && python -m tools.write_support_table

A page has the full matrix between `<!-- matrix -->` and `<!-- end of matrix -->`, how many cells of
which kind there are between `<!-- counts -->` and `<!-- end of counts -->`, a summary between
`<!-- sources -->` and `<!-- end of sources -->`, or none of them.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

from source_models.matrix import FAMILIES, ROUTES
from tests.sources.cell import Status
from tests.sources.matrix import load_results

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = (ROOT / "README.md", ROOT / "docs" / "sources.md")
Record = dict[str, Any]
_NO_SOURCE: Final = Status.NO_SOURCE.value

_TITLES: Final = {
    "optimum": "optimum-onnx 0.1.0 (`optimum-cli export onnx`)",
    "dynamo": "`torch.onnx.export(dynamo=True)`",
    "torchscript": "`torch.onnx.export(dynamo=False)`",
    "onnx-exporter": "transformers' `OnnxExporter`",
    "genai": "onnxruntime-genai's model builder",
    "mobius": "mobius-onnx 0.1.0",
}


def matrix_table(results: dict[str, Record]) -> str:
    """A row per route, a column per family, the reasons of refusals below."""
    reasons: list[str] = []
    lines = [
        "| source | " + " | ".join(FAMILIES) + " |",
        "|---|" + "---|" * len(FAMILIES),
    ]
    for route in ROUTES:
        cells = [results.get(f"{route}/{family}") for family in FAMILIES]
        if any(cells):
            lines.append(f"| `{route}` | " + " | ".join(_cell(x, reasons) for x in cells) + " |")
    notes = [f"{index}. {reason}" for index, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])


def _cell(record: Record | None, reasons: list[str]) -> str:
    if record is None:
        return ""
    if record["status"] == "exported":
        twin = any("dense twin" in note for note in record["notes"])
        return f"{record['error']:.0e}" + (" (dense twin)" if twin else "")
    reason, word = _plain(record["reason"]), record["status"]
    if word == _NO_SOURCE:
        reason, word = f"{_NO_SOURCE}: {reason}", "no source"
    if reason not in reasons:
        reasons.append(reason)
    return f"{word} ({reasons.index(reason) + 1})"


def _plain(reason: str) -> str:
    """A reason without what differs from cell to cell."""
    reason = re.sub(r"attention at node \S+: ", "", reason)
    reason = re.sub(r" \(and \d+ more; --explain lists them\)", "", reason)
    reason = re.sub(r"The \w+ model is", "The model is", reason)
    return re.sub(r" \(its inputs: .*?\);", ";", reason)


def counts(results: dict[str, Record]) -> str:
    """How many cells came out how, and the share of right sources that are exported."""
    by_status = Counter(record["status"] for record in results.values())
    made = [record for record in results.values() if record["status"] != _NO_SOURCE]
    right = [record for record in made if _is_right(record)]
    exported = sum(record["status"] == "exported" for record in right)
    kinds = ", ".join(f"{number} {status}" for status, number in by_status.most_common())
    return (
        f"{len(results)} cells: {kinds}. {len(made) - len(right)} sources give other numbers than "
        f"their family's own model; of the {len(right)} others (refused and int4 ones among them, "
        f"which nobody could compare with it) {exported} are exported "
        f"({100 * exported / len(right):.0f} %)."
    )


def _is_right(record: Record) -> bool:
    """Whether the source gives its family's numbers; one that was never run counts as right."""
    return record["source_error"] is None or record["source_error"] < record["source_tolerance"]


def summary_table(results: dict[str, Record]) -> str:
    """A row per exporter: what attention looks like there, and how many models are exported."""
    lines = [
        "| exporter | attention is found as | models exported | largest difference |",
        "|---|---|---|---|",
    ]
    for prefix, title in _TITLES.items():
        records = [x for key, x in results.items() if key.startswith(prefix)]
        made = [x for x in records if x["status"] != _NO_SOURCE]
        exported = [x for x in made if x["status"] == "exported"]
        if not exported:
            continue
        forms = sorted({form for x in exported for form in x["forms"]})
        # half-precision models have a tolerance of their own: their figure would hide the others
        full = [x["error"] for x in exported if x.get("source_tolerance", 0.0) < 1e-2]
        worst = f"{max(full):.0e}" if full else ""
        lines.append(
            f"| {title} | {', '.join(f'`{form}`' for form in forms)} | "
            f"{len(exported)} of {len(made)} | {worst} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Rewrites the marked blocks of the pages that have them."""
    results = load_results()
    if not results:
        print("no results: run python -m tests.sources.matrix first", file=sys.stderr)
        return 1
    blocks = {
        "matrix": matrix_table(results),
        "counts": counts(results),
        "sources": summary_table(results),
    }
    for page in PAGES:
        if page.is_file():
            text = page.read_text(encoding="utf-8")
            page.write_text(_filled(text, blocks), encoding="utf-8")
    return 0


def _filled(text: str, blocks: dict[str, str]) -> str:
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda _, b=block, s=start, e=end: f"{s}\n{b}\n{e}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    sys.exit(main())
