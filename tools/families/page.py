"""docs/families.md from the results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "families.md"
_PACKAGES: Final = ("transformers", "torch", "onnxruntime")
_HEAD: Final = """# Families of transformers

Written by `make families`; do not edit. Every causal language model that transformers knows, made
tiny with random weights ({layers} layers, sizes shrunk from the family's defaults), by both ways
into TriangleMix:

- **folder**: `trianglemix-export` of its Hugging Face folder. A number is the largest difference
  of the export's logits from transformers', as a share of the largest logit: a short prompt, and
  {tokens} tokens with a cut window against the model's own attention function under that mask.
- **patch**: `trianglemix.pytorch.patch` (and with it `trianglemix-eval` and `trianglemix-analyze`)
  in the same way; besides, nothing dropped changes nothing, a left-padded row generates what it
  generates alone, `unpatch` restores the model, and the gradient probe runs.

"No" is a refusal; its reason stands below by its number. Mind that a family refused as a folder may
export as an ONNX file that another tool made: [sources.md](sources.md).

{versions}, {day}: {counts}.
"""


def write_page(records: Sequence[dict[str, Any]], layers: int, tokens: int) -> None:
    """Writes the page."""
    made = [record for record in records if record["export"]["status"] != "not made"]
    skipped = [record for record in records if record["export"]["status"] == "not made"]
    reasons: list[str] = []
    rows = [
        f"| {record['family']} | {record['class']} | {_cell(record['export'], reasons)} "
        f"| {_cell(record['patch'], reasons)} |"
        for record in made
    ]
    lines = [
        _HEAD.format(
            layers=layers,
            tokens=tokens,
            versions=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
            day=date.today().isoformat(),
            counts=_counts(made, len(skipped)),
        ),
        "| family | model | folder | patch |",
        "|---|---|---|---|",
        *rows,
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
        "",
        "Not made here, by the family's own error on shrunk sizes:",
        "",
        *(f"- {record['family']}: {_cleaned(record['export']['detail'])}" for record in skipped),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counts(made: Sequence[dict[str, Any]], skipped: int) -> str:
    words = []
    for way, name in (("export", "as folders"), ("patch", "patched")):
        by = Counter(record[way]["status"] for record in made)
        words.append(f"{name} {by['right']} right, {by['refused']} refused, {by['wrong']} wrong")
    return f"{len(made)} families, {', '.join(words)}; {skipped} could not be made"


def _cell(outcome: dict[str, str], reasons: list[str]) -> str:
    if outcome["status"] == "right":
        return outcome["detail"]
    reason = _general(outcome["detail"])
    if reason not in reasons:
        reasons.append(reason)
    word = "No" if outcome["status"] == "refused" else "**WRONG**"
    return f"{word} ({reasons.index(reason) + 1})"


def _general(reason: str) -> str:
    """A reason without what differs from family to family."""
    reason = re.sub(r"\b\w+(ForCausalLM|LMHeadModel|WithLMHead)\b", "The model", _cleaned(reason))
    reason = re.sub(r"\b(layers? )(\d+|\[[\d, ]+\])", r"\1N", reason)
    reason = re.sub(r"\(layer N\)|\blayer N \(\w+\)", "a layer", reason)
    reason = re.sub(r"\b(is a mixture of experts) \(\w+\)", r"\1", reason)
    reason = re.sub(r" \((aten::histc|the model's code decides .*?)\)", "", reason)
    reason = re.sub(r"\b\w+Attention\b", "its attention", reason)
    reason = reason.replace("layers N of", "layers of").replace("layer N of", "a layer of")
    reason = reason.replace(" The model", " the model")
    return reason[0].upper() + reason[1:]


def _cleaned(reason: str) -> str:
    reason = re.sub(r"/\S+/folder", "the folder", reason)
    return " ".join(reason.replace("|", "/").replace("<", "&lt;").split())
