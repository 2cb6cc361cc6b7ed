"""Every message that refuses something has an entry in docs/troubleshooting.md, and the reverse."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
_REFUSING: Final = frozenset(
    {"RefusedError", "CutError", "CutRunError", "Refusal", "NotAttentionError",
     "FrozenDecisionError", "_MaskUsedError", "ExportError", "PlanError", "FolderError",
     "ProviderError", "PromptError", "FallbackError", "ExecutionError", "MissingPackageError",
     "ManifestError", "LibraryNotFoundError", "FeedError", "ConfigurationError",
     "WeightsError", "ServingError"}
)  # fmt: skip
_REASONS: Final = (
    "attention/foreign_operators.py", "attention/why_no_attention.py", "patterns/_carried.py",
    "patterns/_softmax_walk.py", "patterns/_softmax_reasons.py",
)  # fmt: skip
"""Files of the exporter whose functions return clauses that messages end with."""
_WORDS: Final = 3
_FROM_ELSEWHERE: Final = re.compile(r"[{}: (),]*(and |besides, )?[{}: (),]*")
"""Messages that only hand on another one."""


def _text(node: ast.expr) -> str:
    """A string expression, with {} for what is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) if isinstance(part, ast.Constant) else "{}"
                           for part in parts)  # fmt: skip
        case ast.IfExp(body=one, orelse=other):
            return f"{_text(one)} {_text(other)}"
        case ast.BinOp(left=one, right=other):
            return _text(one) + _text(other)
    return "{}"


def _messages() -> Iterator[tuple[str, str]]:
    """Where, and the message."""
    for package in ("exporter", "runtime", "manifest", "hf", "custom_ops", "vllm_plugin"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                    continue
                if node.func.id in _REFUSING and node.args:
                    text = " ".join(_text(argument) for argument in node.args)
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _reasons() -> Iterator[tuple[str, str]]:
    """Where, and a clause that a function returns or a table of reasons holds."""
    for name in _REASONS:
        tree = ast.parse((ROOT / "exporter" / name).read_text(encoding="utf-8"))
        given = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
        given += [one for node in tree.body if isinstance(node, ast.AnnAssign)
                  if isinstance(node.value, ast.Dict) for one in node.value.values]  # fmt: skip
        for value in given:
            text = "" if value is None else _text(value)
            if len(text.replace("{}", "").split()) > _WORDS:
                yield f"exporter/{name}:{value and value.lineno}", text


def _phrases() -> list[str]:
    """What stands in the first column of the page's tables."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]


def test_every_refusal_has_an_entry() -> None:
    phrases = _phrases()
    missing = [
        f"{where}: {text}"
        for where, text in (*_messages(), *_reasons())
        if not _FROM_ELSEWHERE.fullmatch(text) and not any(phrase in text for phrase in phrases)
    ]
    assert not missing, "\n".join(missing)


def test_every_entry_is_about_a_message() -> None:
    texts = [text for _, text in _messages()]
    for name in _REASONS:
        tree = ast.parse((ROOT / "exporter" / name).read_text(encoding="utf-8"))
        texts += [_text(node) for node in ast.walk(tree) if isinstance(node, ast.expr)]
    stale = [phrase for phrase in _phrases() if not any(phrase in text for text in texts)]
    assert not stale
