"""The CUDA kernels' shared library, called through its C interface: no framework, no compiler.

The structures are those of `src/problem.h`, `src/block_sparse/problem.h` and
`src/cuda/cuda_library.h`; a test compiles the headers and compares sizes and offsets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from trianglemix.custom_ops.library import LibraryNotFoundError

CUDA_LIBRARY_NAME: Final = "libtrianglemix_cuda.so"
ABI: Final = 4
"""`TRIANGLEMIX_CUDA_ABI`: since 3 a null `key` appends nothing, since 4 keys may lie by pages."""
FLOAT32: Final = 0
FLOAT16: Final = 1
BFLOAT16: Final = 2


class Rotation(ctypes.Structure):
    """`Rotation`: all zero where nothing is rotated."""

    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("positions", c_int64),
        ("size", c_int64),
        ("interleaved", ctypes.c_bool),
    )


class PageStrides(ctypes.Structure):
    """`PageStrides`, in numbers."""

    _fields_ = (("page", c_int64), ("head", c_int64), ("slot", c_int64))


class KeyPages(ctypes.Structure):
    """`KeyPages`: all zero where keys and values lie in one piece."""

    _fields_ = (
        ("table", c_void_p),
        ("row_pages", c_int64),
        ("size", c_int64),
        ("count", c_int64),
        ("key", PageStrides),
        ("value", PageStrides),
    )


class Problem(ctypes.Structure):
    """`AttentionProblem`: one call; pointers are addresses in device memory.

    Keys and values are `present_key [B, G, T, D]` and `present_value [B, G, T, Dv]`, `T` being
    `present_capacity`; a null `key` and `value` say that the new tokens' are there already. With
    `pages` they are pools of pages instead.
    """

    _fields_ = (
        ("dtype", c_int32),
        ("sink", c_int64),
        ("window", c_int64),
        ("last", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("batch", c_int64),
        ("query_length", c_int64),
        ("num_heads", c_int64),
        ("kv_num_heads", c_int64),
        ("head_size", c_int64),
        ("value_head_size", c_int64),
        ("past_capacity", c_int64),
        ("present_capacity", c_int64),
        ("total", c_int64),
        ("rotation", Rotation),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("past_key", c_void_p),
        ("past_value", c_void_p),
        ("output", c_void_p),
        ("present_key", c_void_p),
        ("present_value", c_void_p),
        ("seqlens_k", c_void_p),
        ("prompt_length", c_void_p),
        ("first_valid", c_void_p),
        ("pages", KeyPages),
    )


class BlockSparseProblem(Problem):
    """`BlockSparseProblem`: `block_mask [B, H, C, C]` (uint8) is null where it is not wanted."""

    _fields_ = (  # type: ignore[assignment]
        ("mass", c_float),
        ("min_length", c_int64),
        ("block_mask", c_void_p),
    )


class KernelTable(ctypes.Structure):
    """`CudaKernels`: what the library has for one operator."""

    _fields_ = (
        ("abi", c_int32),
        ("problem_bytes", ctypes.c_size_t),
        ("workspace_bytes", ctypes.CFUNCTYPE(ctypes.c_size_t, c_void_p)),
        ("run", ctypes.CFUNCTYPE(c_char_p, c_void_p, c_void_p, c_void_p)),
    )


@dataclass(frozen=True)
class CudaKernels:
    """One operator's functions. The problem's CUDA device has to be the current one.

    `workspace_bytes(problem)` is the scratch that `run(problem, workspace, stream)` needs, from
    sizes alone. `run` enqueues everything on the stream and returns None or an error's text. The
    problem is given as its address.
    """

    problem: type[Problem]
    workspace_bytes: Callable[[int], int]
    run: Callable[[int, int, int], bytes | None]


TRIANGLE: Final = ("trianglemix_cuda_library", Problem)
BLOCK_SPARSE: Final = ("trianglemix_cuda_block_sparse", BlockSparseProblem)
"""Entry symbol and problem of each operator."""


def cuda_library_path() -> Path:
    """Where the library lies in an installation that was built with CUDA."""
    found = resources.files("trianglemix.custom_ops").joinpath(CUDA_LIBRARY_NAME)
    return Path(str(found))


@lru_cache(maxsize=8)
def load_kernels(entry: str, problem: type[Problem], path: Path | None = None) -> CudaKernels:
    """The functions of one operator, from `path` or from this installation.

    Raises:
        LibraryNotFoundError: there is no such library here, it cannot be opened, or it was built
            from other sources.
    """
    path = cuda_library_path() if path is None else path
    if not path.is_file():
        raise LibraryNotFoundError(
            f"{CUDA_LIBRARY_NAME} is not in this installation of trianglemix; install the wheel "
            "that was built with CUDA"
        )
    try:
        function = getattr(ctypes.CDLL(str(path.resolve())), entry)
    except (OSError, AttributeError) as error:
        raise LibraryNotFoundError(
            f"{CUDA_LIBRARY_NAME} cannot be opened ({error}); install the wheel that was built "
            "with CUDA"
        ) from error
    function.restype = ctypes.POINTER(KernelTable)
    table: Any = function().contents
    if (table.abi, table.problem_bytes) != (ABI, ctypes.sizeof(problem)):
        raise LibraryNotFoundError(
            f"{CUDA_LIBRARY_NAME} has interface version {table.abi}, but this package needs {ABI}; "
            "build or install both from the same sources"
        )
    return CudaKernels(problem, table.workspace_bytes, table.run)
