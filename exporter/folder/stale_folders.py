"""What exports that were killed left beside their output, put away by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_YOUNG: Final = 60.0  # seconds: another process may just be making it


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Marks a folder as in use, as long as this process lives; where locks are not, nothing."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def put_away(output: Path, unfinished: str, replaced: str) -> None:
    """Removes what killed exports to `output` left; gives back an export that one had moved away.

    `unfinished` and `replaced` are the beginnings of the names, which end with the process's
    number.
    """
    for old in _named(output.parent, f".{output.name}{replaced}-"):
        if _lives(_process(old)):
            continue
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, output)
    partials = _named(output.parent, f".{output.name}{unfinished}-")
    for partial in [*partials, *_named(output, f"{unfinished}-")]:
        if _is_stale(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _named(parent: Path, beginning: str) -> list[Path]:
    """Folders of that name with a number at its end."""
    if not parent.is_dir():
        return []
    return [
        path
        for path in parent.iterdir()
        if path.name.startswith(beginning)
        and path.name.removeprefix(beginning).isdecimal()
        and path.is_dir()
        and not path.is_symlink()
    ]


def _process(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _is_stale(folder: Path) -> bool:
    """Whether nobody holds it; one whose process lives may have been made this moment."""
    if _lives(_process(folder)) and time.time() - folder.stat().st_mtime < _YOUNG:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else's, or a file system without locks
        return False
    return True
