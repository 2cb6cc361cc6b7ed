"""Puts a data file at another place: a hard link, a clone that shares its blocks, or a copy."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, Literal

from trianglemix.exporter.errors import ExportError

Placed = Literal["linked", "cloned", "copied"]
BytesCopied = Callable[[int], None]
"""Called with the bytes copied so far."""

_CHUNK: Final = 128 << 10  # 1 MiB, more than the inner caches hold, takes three times as long
_KERNEL_CHUNK: Final = 64 << 20
_FICLONE: Final = 0x40049409  # linux/fs.h; Python's fcntl has no name for it before 3.12
_NOT_SUPPORTED: Final = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def place_file(source: Path, target: Path, *, link: bool, progress: BytesCopied) -> Placed:
    """Puts a file at `target`, whose folder may not be there yet: as cheaply as it may.

    With `link` a hard link where possible. Otherwise a file of its own: a clone where the file
    system has them (btrfs, XFS), else a copy. A symbolic link in the source is followed.

    Raises:
        ExportError: there is not enough room for a copy.
        OSError: a file cannot be read or written.
    """
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if link and _link(source, target):
        return "linked"
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        if _clone(reader, writer):
            return "cloned"
        _check_room(source, target)
        _copy(reader, writer, progress)
    return "copied"


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False  # another file system, or one without links
    return True


def _clone(reader: BinaryIO, writer: BinaryIO) -> bool:
    try:
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        return False  # another file system, or one without clones
    return True


def _check_room(source: Path, target: Path) -> None:
    size, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if size > free:
        raise ExportError(
            f"a copy of {source.name} needs {size / 2**30:.1f} GiB, but {target.parent} has "
            f"{free / 2**30:.1f} GiB free; give a folder with more room, or share the file with "
            "the source (--weights link)"
        )


def _copy(reader: BinaryIO, writer: BinaryIO, progress: BytesCopied) -> None:
    """By the kernel where it can, else through one buffer."""
    done, size = 0, os.fstat(reader.fileno()).st_size
    while done < size:
        try:
            count = os.copy_file_range(reader.fileno(), writer.fileno(), _KERNEL_CHUNK)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            count = 0
        if not count:
            break
        done += count
        progress(done)
    buffer = memoryview(bytearray(_CHUNK))  # one for all: fresh ones cost more than the disk
    while count := reader.readinto(buffer):  # type: ignore[attr-defined]
        view = buffer[:count]
        while view:  # a raw file may take less than it is given
            view = view[writer.write(view) :]
        done += count
        progress(done)
