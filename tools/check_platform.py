"""Stops an installation on a system that the project is not built for."""

import platform
import sys

if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
    sys.exit(
        f"trianglemix is built for Linux on x86-64 and aarch64, this is "
        f"{platform.system()} on {platform.machine()}"
    )
