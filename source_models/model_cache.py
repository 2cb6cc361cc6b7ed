"""Folders of generated models under `build/`, made once per set of package versions."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

BUILD: Final = Path(__file__).resolve().parent.parent / "build"

TOKENIZER_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What lies beside a model file in a folder that users have."""


def cached_folder(
    parent: Path, name: str, packages: Sequence[str], make: Callable[[Path], None]
) -> Path:
    """Folder `parent/<name>-<versions>`; `make` fills it under another name, then it is renamed.

    So an interrupted `make` leaves nothing that looks finished, and two processes may race.
    """
    folder = parent / "-".join([name, *(version(package) for package in packages)])
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        make(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # another process was quicker: its folder is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def copy_companions(source: Path, target: Path) -> None:
    """Copies the configuration and tokenizer files that `source` has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
