"""Files and modules that README and docs name exist (not experiments.md, which is history)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md"))
    if page.name != "experiments.md"
)
_PATH: Final = re.compile(r"(?<![\w./<~*{$-])([a-z_.]\w*(?:/[\w.*<>-]+)+/?)")
_MODULE: Final = re.compile(r"(?<![\w./-])([a-z_]\w*(?:\.[a-z_]\w*)+)")
_ENDINGS: Final = ("html", "json", "md", "py", "svg")
_LINK: Final = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@cache
def _files() -> tuple[str, ...]:
    """Tracked files and new ones, by their path from the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    return tuple(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@cache
def _folders() -> frozenset[str]:
    """The folders at the top of the repository."""
    return frozenset(name.split("/", 1)[0] for name in _files() if "/" in name)


def _exists(path: str) -> bool:
    """A file, or a folder of files; `*` and `<name>` stand for anything."""
    pattern = re.sub(r"<[^>]*>", "*", path.rstrip("/."))
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}/*") for name in _files())


def _module_exists(name: str) -> bool:
    """A module, or what a module holds: all but the last part name a file."""
    path = name.removeprefix("trianglemix.").replace(".", "/")
    holder = path.rpartition("/")[0] or "package/trianglemix"
    files = (f"{path}.py", f"{path}/__init__.py", f"{holder}.py", f"{holder}/__init__.py")
    return any(_exists(file) or _exists(f"package/trianglemix/{file}") for file in files)


def _missing(text: str) -> Iterator[str]:
    """What the text names inside our folders and nobody finds."""
    for path in _PATH.findall(text):
        if path.split("/", 1)[0] in _folders() and not _exists(path):
            yield path
    for name in _MODULE.findall(text):
        root, end = name.split(".", 1)[0], name.rsplit(".", 1)[1]
        if (
            root in {"trianglemix", *_folders()}
            and end not in _ENDINGS
            and not _module_exists(name)
        ):
            yield name


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [
        link for link in _LINK.findall(text) if not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert [*dict.fromkeys(_missing(text)), *links] == []
