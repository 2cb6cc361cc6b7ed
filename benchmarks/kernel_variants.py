"""Builds the operator library once for each CPU kernel, for tests and benchmarks that choose one.

The installed library chooses by the processor; nothing outside it can change that.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from trianglemix.custom_ops.triangle.contract import TrianglePattern

from source_models.model_cache import BUILD

SOURCE: Final = BUILD.parent / "custom_ops"
REQUIRED_FLAGS: Final = {
    "plain": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
}
"""What a variant needs of `/proc/cpuinfo`."""


@functools.cache
def build_variants() -> dict[str, Path]:
    """Variant name to library, for the variants of this architecture, built where out of date.

    Raises:
        subprocess.CalledProcessError: the compiler's message is in `stdout`.
    """
    folder = BUILD / "kernel_variants"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DTRIANGLEMIX_VARIANT_LIBRARIES=ON"]
        options.append("-DCMAKE_CUDA_COMPILER=NOTFOUND")  # these libraries are for the CPU
        run_cmake(["-S", str(SOURCE), "-B", str(folder), "-G", "Ninja", *options])
        run_cmake(["--build", str(folder), "--target", "kernel_variants", "--parallel", "2"])
    found = {path.stem.rpartition("_")[2]: path for path in folder.glob("libtrianglemix_ops_*.so")}
    return {name: found[name] for name in REQUIRED_FLAGS if name in found}


def runs_here(variant: str) -> bool:
    """Whether this processor has the instructions of `variant`."""
    if variant == "plain":
        return True
    flags = set[str]()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    return flags >= REQUIRED_FLAGS[variant]


def visited_pairs(
    library: Path, heads: tuple[int, int], length: int, pattern: TrianglePattern
) -> int:
    """Pairs of a row and a key whose score the library's kernel computes for a whole prompt.

    `heads` is `(H, G)`; the prompt has `length` tokens.
    """
    count = ctypes.CDLL(str(library)).trianglemix_visited_pairs
    count.restype = ctypes.c_int64
    count.argtypes = [ctypes.c_int64] * 6
    limits = (pattern.num_sink_tokens, pattern.sliding_window_size, pattern.num_last_tokens)
    return int(count(*heads, length, *limits))


def run_cmake(arguments: list[str]) -> None:
    """Runs CMake with the environment's own programs; what it says is in an error's `stdout`."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    command = shutil.which("cmake", path=path) or "cmake"
    environment = {**os.environ, "PATH": path}
    subprocess.run(
        [command, *arguments],
        check=True,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
