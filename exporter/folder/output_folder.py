"""The output folder: written under another name, moved to its place when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.folder.stale_folders import held, put_away
from trianglemix.exporter.options import ExportOptions
from trianglemix.manifest import manifest

_UNFINISHED: Final = ".unfinished"
_REPLACED: Final = ".replaced"


@contextmanager
def workplace(options: ExportOptions) -> Iterator[Path]:
    """The unfinished output folder; for a dry run a temporary one that goes away."""
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix="trianglemix-") as folder:
            yield Path(folder)
        return
    if options.output is None:
        raise ExportError("no output folder given; add -o FOLDER (or --dry-run)")
    source = options.source if options.source.is_dir() else options.source.parent
    if options.output.resolve() == source.resolve():
        raise ExportError(f"the output {options.output} is the source's own folder; give another")
    with output_folder(options.output, force=options.force) as folder:
        yield folder


@contextmanager
def output_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the place of `output` when the block ends well.

    A mount point cannot be renamed, and the current folder would be lost to the shell that stands
    in it: there the temporary folder lies inside, and its entries are moved up. An error or an
    interrupt removes it. A killed process leaves it, for the next export to `output` to remove.

    Raises:
        ExportError: `output` exists and may not be replaced, or cannot be written.
    """
    output = output.absolute()
    put_away(output, _UNFINISHED, _REPLACED)
    check_output(output, force=force)
    stays = output.is_dir() and (output.is_mount() or output.samefile(Path.cwd()))
    name = f"{_UNFINISHED}-{os.getpid()}"
    partial = output / name if stays else output.with_name(f".{output.name}{name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error}") from error
    try:
        with held(partial):
            yield partial
            check_output(output, force=force)  # another export may have come first
            if stays:
                _move_up(partial, output)
            else:
                _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path, *, force: bool) -> None:
    """Raises ExportError where an export may not be put: only our own folders are replaced."""
    if output.is_dir():
        if all(entry.name.startswith(_UNFINISHED) for entry in output.iterdir()):
            return
        ours = (output / manifest.FILE_NAME).is_file()
        if not ours:
            raise ExportError(
                f"{output} is not empty and holds no earlier export; give a new folder"
            )
        if not force:
            raise ExportError(f"{output} holds an earlier export; --force replaces it")
    elif output.exists():
        raise ExportError(f"{output} is a file; give the name of a folder")


def _move_up(partial: Path, output: Path) -> None:
    """Empties `output`, its manifest first, and fills it, its manifest last."""
    try:
        (output / manifest.FILE_NAME).unlink(missing_ok=True)
        for old in output.iterdir():
            if old.name.startswith(_UNFINISHED):
                continue
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        for new in sorted(partial.iterdir(), key=lambda path: path.name == manifest.FILE_NAME):
            os.rename(new, output / new.name)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error}") from error


def _put_in_place(partial: Path, output: Path) -> None:
    try:
        if not output.exists():
            os.rename(partial, output)
            return
        old = output.with_name(f".{output.name}{_REPLACED}-{os.getpid()}")
        os.rename(output, old)
        try:
            os.rename(partial, output)
        except OSError:
            os.rename(old, output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error}") from error
