"""The CUDA library's C interface without a GPU: `host_kernels.cc`, and what the headers say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
HEADERS: Final = HERE.parents[1] / "custom_ops" / "src"
STREAM: Final = 77
"""The stream that the host kernels take calls on."""


def compile_cpp(source: Path, target: Path, *options: str) -> Path:
    """Compiles against the library's headers; returns `target`."""
    compiler = shutil.which("g++")
    assert compiler is not None, "these tests compile C++: install g++"
    command = [
        compiler, "-std=c++17", "-O2", "-Wall", "-Werror", f"-I{HEADERS}", *options, str(source),
        "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def host_library(folder: Path, *options: str) -> Path:
    """A library with the CUDA library's interface that runs on the host."""
    target = folder / "libtrianglemix_cuda.so"
    return compile_cpp(HERE / "host_kernels.cc", target, "-shared", "-fPIC", *options)


_LAYOUT: Final = """
#include <cstdio>
#include "block_sparse/problem.h"
#include "cuda/cuda_library.h"
using namespace trianglemix;
#define SIZE(name, type) std::printf("\\"%s\\": %zu,\\n", name, sizeof(type));
#define FIELD(name, type, field) \\
  std::printf("\\"%s\\": %zu,\\n", name, __builtin_offsetof(type, field));
int main() {
  std::printf("{");
  FIELDS
  std::printf("\\"abi\\": %d}", TRIANGLEMIX_CUDA_ABI);
}
"""


def header_layout(folder: Path, types: dict[str, list[str]]) -> dict[str, int]:
    """Size of each C++ type by its name, and offset of each field by `type.field`."""
    lines = "\n".join(
        f'SIZE("{name}", {name})\n'
        + "\n".join(f'FIELD("{name}.{field}", {name}, {field})' for field in fields)
        for name, fields in types.items()
    )
    source = folder / "layout.cc"
    source.write_text(_LAYOUT.replace("FIELDS", lines))
    program = compile_cpp(source, folder / "layout", "-Wno-invalid-offsetof")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    layout: dict[str, int] = json.loads(done.stdout)
    return layout
