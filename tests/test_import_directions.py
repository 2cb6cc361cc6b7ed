"""Who may import whom (docs/conventions.md, decision 0011), read from the sources themselves.

import-linter keeps the order of the layers; this names every direction, and the modules behind the
narrow ones, so that a new one is a decision and not an accident.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = (
    "custom_ops", "manifest", "hf", "exporter", "runtime", "pytorch", "evaluation", "analysis",
    "models", "vllm",
)  # fmt: skip
FOLDERS: Final = {"vllm": "vllm_plugin"}
"""Packages whose folder has another name: `vllm` at the top would be taken for vLLM itself."""
ANYTHING: Final = frozenset({"*"})
DIRECTIONS: Final[dict[tuple[str, str], frozenset[str]]] = {
    ("manifest", "custom_ops"): ANYTHING,
    ("hf", "custom_ops"): ANYTHING,
    ("exporter", "hf"): ANYTHING,
    ("pytorch", "hf"): ANYTHING,
    ("evaluation", "hf"): ANYTHING,
    ("exporter", "custom_ops"): ANYTHING,
    ("exporter", "manifest"): ANYTHING,
    ("runtime", "manifest"): ANYTHING,
    ("evaluation", "manifest"): ANYTHING,
    ("runtime", "custom_ops"): ANYTHING,
    ("pytorch", "custom_ops"): ANYTHING,
    ("evaluation", "custom_ops"): ANYTHING,
    ("evaluation", "runtime"): ANYTHING,
    ("evaluation", "pytorch"): ANYTHING,
    ("evaluation", "exporter"): frozenset({"layers.plan", "options"}),
    ("analysis", "custom_ops"): ANYTHING,
    ("analysis", "pytorch"): ANYTHING,
    ("analysis", "evaluation"): ANYTHING,
    ("analysis", "exporter"): frozenset({"layers.plan", "layers.block_sparse_plan"}),
    ("analysis", "runtime"): frozenset({"tokenizer"}),
    ("vllm", "custom_ops"): ANYTHING,
    ("vllm", "pytorch"): ANYTHING,
    ("vllm", "exporter"): frozenset({"layers.plan", "options"}),
}
"""Modules of the second package that the first may import."""
AROUND: Final[dict[str, tuple[str, ...]]] = {
    "source_models": ("source_models",),
    "benchmarks": ("benchmarks", "source_models", "tests.custom_ops.tolerances", "vllm"),
    "tools": ("tools", "source_models", "tests.sources"),
    "tests": ("tests", "source_models", "benchmarks", "tools", "vllm"),
    **dict.fromkeys(PACKAGES, ()),
    "vllm": ("vllm",),  # the engine itself
}
"""What each folder may import by the folder's name; packages are imported from `trianglemix`."""

_TORCH: Final = (
    "analysis/", "pytorch/", "evaluation/huggingface.py", "exporter/sources/huggingface/",
    "vllm_plugin/",
)  # fmt: skip
_TRANSFORMERS: Final = _TORCH[:-1]
HOMES: Final = {
    "vllm": ("vllm_plugin/",),
    "torch": _TORCH,
    "transformers": _TRANSFORMERS,
    "onnxruntime": (
        "runtime/backends/ort",
        "runtime/backends/device_memory.py",
        "exporter/graph/ort.py",
    ),
}
"""Beginnings of the files that may name a large package."""


def _within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _package(file: str) -> str:
    """The package that a file belongs to, or its folder at the top."""
    folder = file.split("/", 1)[0]
    return next((name for name, place in FOLDERS.items() if place == folder), folder)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Full names: of `from a.b import c` it is `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _imports(folders: tuple[str, ...] = PACKAGES) -> tuple[tuple[str, str], ...]:
    """`(file, imported name)` of the folders' sources."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / FOLDERS.get(folder, folder)).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(str(path.relative_to(ROOT)), name) for name in _imported(tree)]
    return tuple(found)


def _directions() -> Iterator[tuple[str, tuple[str, str], str]]:
    """`(file, (importing, imported package), what of it)` across packages."""
    for file, name in _imports():
        root, *rest = name.split(".")
        importing = _package(file)
        if root == "trianglemix" and rest and rest[0] in PACKAGES and rest[0] != importing:
            yield file, (importing, rest[0]), ".".join(rest[1:])


def test_every_import_goes_an_allowed_way() -> None:
    wrong = []
    for file, direction, module in _directions():
        allowed = DIRECTIONS.get(direction, frozenset())
        if allowed != ANYTHING and not any(_within(module, name) for name in allowed):
            wrong.append(f"{file} imports {'.'.join(filter(None, (direction[1], module)))}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_direction_is_allowed_in_vain() -> None:
    used = {(direction, module) for _, direction, module in _directions()}
    for direction, modules in DIRECTIONS.items():
        assert any(direction == way for way, _ in used), direction
        if modules != ANYTHING:
            for module in modules:
                assert any(way == direction and _within(name, module) for way, name in used)


def test_models_are_made_below_benchmarks_and_tools() -> None:
    """Both take them from `source_models`, and neither imports the other; nor `import exporter`."""
    wrong = [
        f"{file} imports {name}"
        for file, name in _imports(tuple(AROUND))
        if name.split(".", 1)[0] in AROUND
        and not any(_within(name, allowed) for allowed in AROUND[_package(file)])
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_outside_a_target_imports_it() -> None:
    """Targets are found by their place (`exporter/registry.py`); what they share has a `_`."""
    prefix = "trianglemix.exporter.targets."
    for file, name in _imports():
        target = name.removeprefix(prefix).split(".", 1)[0]
        if name.startswith(prefix) and not target.startswith("_"):
            assert file.startswith((f"exporter/targets/{target}/", f"exporter/targets/{target}.py"))


@pytest.mark.parametrize("package", HOMES)
def test_large_packages_stay_where_they_are_needed(package: str) -> None:
    files = {file for file, name in _imports() if name.split(".", 1)[0] == package}
    assert files
    assert not [file for file in sorted(files) if not file.startswith(HOMES[package])]


@pytest.mark.parametrize("program", ["exporter", "runtime", "evaluation", "analysis"])
def test_programs_start_without_the_large_packages(program: str) -> None:
    """They are imported when used: `--help` and a refusal need none of them."""
    code = (
        f"import sys, trianglemix.{program}.cli\nprint(*sorted(set(sys.modules) & {set(HOMES)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
