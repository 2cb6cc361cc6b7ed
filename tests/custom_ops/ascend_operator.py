"""Compiles the AscendC operator's sources with the host shim, and runs calls through them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.reference import Attention

Array = NDArray[Any]

SOURCES: Final = Path(__file__).resolve().parents[2] / "custom_ops" / "ascend" / "opp"
SHIM: Final = Path(__file__).parent / "ascend" / "shim"
KERNELS: Final = {"float16": 0, "bfloat16": 1}
"""Kernels of a library by name; those of `run_operator.cc` are named after what they take."""
MEMORIES: Final = ("unified buffer", "L1", "L0A", "L0B", "L0C")


class FaultError(Exception):
    """The shim caught an access that the device would get wrong."""


class RefusalError(Exception):
    """The tiling does not take the call."""


def compile_library(
    source: Path, target: Path, options: Sequence[str] = ("-O1",), sources: Path = SOURCES
) -> Path:
    """`source` as a shared library, with the operator's headers from `sources`."""
    compiler = shutil.which("g++")
    assert compiler is not None, "these tests compile C++: install g++"
    folders = (SHIM, sources / "op_kernel", sources / "op_host", SOURCES.parents[1] / "src")
    command = [
        compiler, "-std=c++17", *options, "-Wall", "-Wextra", "-Wno-unused-parameter",
        "-Werror", "-shared", "-fPIC", *(f"-I{folder}" for folder in folders),
        str(source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@dataclass(frozen=True)
class Outcome:
    """What a call gave; memories in bytes by name, as buffers took them and as the tiling says."""

    output: Array
    present_key: Array
    present_value: Array
    taken: dict[str, int]
    planned: dict[str, int]


@dataclass(frozen=True)
class Setting:
    """How a call is run: on how many cube cores, and whether past and present are one buffer."""

    cores: int = 2
    shared_cache: bool = False


class AscendOperator:
    """The operator's tiling and kernel, on the shim."""

    def __init__(self, library: Path, kernels: Mapping[str, int] = KERNELS) -> None:
        self._run = ctypes.CDLL(str(library)).ascend_run
        self._kernels = kernels

    def __call__(
        self, call: Call, attention: Attention, kernel: str, setting: Setting = Setting()
    ) -> Outcome:
        """Runs `call` by one of the library's kernels, whose type its arrays hold.

        Raises:
            FaultError: the shim caught a fault; the message says what and where.
            RefusalError: the tiling refuses the call.
        """
        assert call.key is not None
        assert call.value is not None
        past = call.past_key.shape[2]
        slots = max(past, call.total_sequence_length)
        outputs = _outputs(call, attention, slots)
        if setting.shared_cache:
            outputs[1][:, :, :past] = call.past_key
            outputs[2][:, :, :past] = call.past_value
        pasts = outputs[1:] if setting.shared_cache else (call.past_key, call.past_value)
        arrays = [
            call.query, call.key, call.value, *(pasts if past else (None, None)),
            call.seqlens_k, call.prompt_length, call.first_valid, *outputs,
        ]  # fmt: skip
        held = [None if a is None else np.ascontiguousarray(a) for a in arrays]
        shape, pattern = attention.shape, attention.pattern
        numbers = [
            *call.query.shape, call.key.shape[2], call.value.shape[2], past, slots,
            shape.num_heads, shape.kv_num_heads, pattern.num_sink_tokens,
            pattern.sliding_window_size, pattern.num_last_tokens,
        ]  # fmt: skip
        memories = (ctypes.c_int64 * (2 * len(MEMORIES)))()
        message = ctypes.create_string_buffer(1000)
        code = self._run(
            (ctypes.c_int64 * len(numbers))(*numbers),
            (ctypes.c_float * 2)(attention.scale, attention.softcap),
            (ctypes.c_void_p * 12)(*(None if a is None else a.ctypes.data for a in held)),
            (ctypes.c_int64 * 12)(*(0 if a is None else a.nbytes for a in held)),
            ctypes.c_int64(setting.cores),
            ctypes.c_int64(self._kernels[kernel]),
            memories,
            message,
            ctypes.c_int64(len(message)),
        )
        if code:
            raise (FaultError if code == 1 else RefusalError)(message.value.decode())
        taken = dict(zip(MEMORIES, memories[: len(MEMORIES)], strict=True))
        planned = dict(zip(MEMORIES, memories[len(MEMORIES) :], strict=True))
        return Outcome(*outputs, taken, planned)


def _outputs(call: Call, attention: Attention, slots: int) -> tuple[Array, ...]:
    """Output and present, full of NaN: what stays so was never written."""
    (batch, length), shape = call.query.shape[:2], attention.shape
    sizes = (
        (batch, length, shape.num_heads * shape.value_head_size),
        (batch, shape.kv_num_heads, slots, shape.head_size),
        (batch, shape.kv_num_heads, slots, shape.value_head_size),
    )
    return tuple(np.full(size, np.nan, call.query.dtype) for size in sizes)
