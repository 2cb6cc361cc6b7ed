"""Where the native library lies."""

from __future__ import annotations

import platform
from importlib import resources
from pathlib import Path
from typing import Final

from trianglemix.custom_ops.errors import TriangleMixError

LIBRARY_NAME: Final = "libtrianglemix_ops.so"


class LibraryNotFoundError(TriangleMixError):
    """The package was installed without its native library."""


def library_path() -> Path:
    """Path of the library for `SessionOptions.register_custom_ops_library(str(library_path()))`.

    Raises:
        LibraryNotFoundError: not built for this system, or missing from the installation.
    """
    found = resources.files("trianglemix.custom_ops").joinpath(LIBRARY_NAME)
    path = Path(str(found))
    if not path.is_file():
        raise LibraryNotFoundError(
            f"{LIBRARY_NAME} is not in this installation of trianglemix ({platform.system()} "
            f"{platform.machine()}); it is built for Linux on x86-64 and aarch64: reinstall there"
        )
    return path
