"""The host shim finds what it is there for: faults planted in small kernels, and in our own."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention

from tests.custom_ops.ascend_operator import (
    SOURCES,
    AscendOperator,
    FaultError,
    compile_library,
)
from tests.custom_ops.cases import Case
from tests.custom_ops.operator_session import Binding

PLANTED: Final = {
    "buffer overflow": "overflows its buffer",
    "global overflow": "at byte 3072 of input is out of bounds",
    "misaligned place": "misaligned: it must be a multiple of 32",
    "misaligned count": "2000 bytes, which is misaligned",
    "misaligned fractal": "misaligned: it must be a multiple of 512",
    "no wait for a copy": "Muls (pipe V) at byte 0 of the unified buffer does not wait for what",
    "no barrier": "does not wait for what was written there by pipe V",
    "no wait for a result": "DataCopy (pipe MTE3) at byte 0 of the unified buffer does not wait",
    "set without wait": "SetFlag without WaitFlag",
    "wait without set": "WaitFlag without SetFlag",
    "no cross-core wait": "at byte 0 of output does not wait",
    "no cross-core set": "deadlock",
    "set too often": "more than 15 times",
    "cross-core set without wait": "flag 3 is set, and nobody waits for it",
    "two of one buffer": "all 1 buffers of the queue are in use",
    "dequeued before queued": "DeQue without EnQue",
    "never freed": "never freed",
    "unwritten": "reads what nobody has written",
    "unified buffer full": "takes 196640 bytes of the unified buffer, which has 196608",
    "L1 full": "of L1, which has 524288",
    "L0C full": "of L0C, which has 131072",
    "vector memory on the cube core": "has no such memory",
    "one row of a product": "m = 1",
    "products without a barrier": "Mmad (pipe M) at byte 0 of L0C does not wait",
    "two blocks at one place": "of output does not wait",
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = Path(__file__).parent / "ascend" / "planted_faults.cc"
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    library = ctypes.CDLL(str(compile_library(source, target, ("-O0",))))
    library.ascend_fault.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("name", ["fine", "fine by hand", "fine relay", "fine product"])
def test_right_kernels_pass(kernels: Any, name: str) -> None:
    assert kernels.ascend_fault(name.encode()) == b""


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(kernels: Any, name: str) -> None:
    assert PLANTED[name] in kernels.ascend_fault(name.encode()).decode()


@dataclass(frozen=True)
class Mutation:
    """A change of one of the kernel's headers, and what the shim says of it."""

    header: str
    old: str
    new: str
    said: str


MUTATIONS: Final = {
    "longer-copy": Mutation(
        "cache",
        "copy.blockCount = Smaller(most, rows.count - done);",
        "copy.blockCount = most + 1;",
        "overflows its buffer",
    ),
    "longer-cast": Mutation(
        "vector",
        "CAST_RINT, rows_ * data.valueSize);",
        "CAST_RINT, rows_ * data.valueSize + 64);",
        "nobody has written",
    ),
    "misaligned-output": Mutation(
        "vector", "narrow[row * data.valueSize]", "narrow[row * data.valueSize + 8]", "misaligned"
    ),
    "no-wait-for-products": Mutation(
        "vector", "AscendC::CrossCoreWaitFlag(kProductsReady);", "", "nobody has written"
    ),
    "signal-too-early": Mutation(
        "vector", "kGroupSync, PIPE_MTE3>", "kGroupSync, PIPE_MTE2>", "does not wait"
    ),
    "past-of-next-row": Mutation(
        "cube", "data.pastSlots + block.first;", "data.pastSlots + 200;", "out of bounds"
    ),
    "no-barrier": Mutation(
        "vector",
        "AscendC::Sub(decay_, peak_, newPeak_, kLanes);\n    AscendC::PipeBarrier<PIPE_V>();",
        "AscendC::Sub(decay_, peak_, newPeak_, kLanes);",
        "Exp (pipe V)",
    ),
    "one-slot": Mutation(
        "call", "return step % kScoreSlots * data.tileRows * kBlockKeys;", "return 0;", "not wait"
    ),
    "longer-fill": Mutation(
        "cube", "zeros.blockNum = rows - block.count;", "zeros.blockNum = rows;", "does not wait"
    ),
    "queries-kept": Mutation(
        "cube", "    queries_.FreeTensor(queries);\n", "", "all 1 buffers of the queue are in use"
    ),
}

MUTANT: Final = """
#define triangle triangle_{number}
#define triangle_attention triangle_attention_{number}
#define TriangleAttentionTilingData TriangleAttentionTilingData_{number}
#include "{kernel}"
#undef triangle
#undef triangle_attention
#undef TriangleAttentionTilingData
#undef TRIANGLEMIX_HOST_DEVICE
"""


def mutate(mutation: Mutation, folder: Path) -> Path:
    """A copy of the kernel's sources with the mutation; returns the file with the entry.

    No two copies are alike: the compiler would take a header with `#pragma once` for the other.
    """
    shutil.copytree(SOURCES / "op_kernel", folder)
    for header in folder.iterdir():
        header.write_text(f"{header.read_text()}// {folder.name}\n")
    header = folder / f"triangle_attention_{mutation.header}.h"
    text = header.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old} is not there once"
    header.write_text(text.replace(mutation.old, mutation.new))
    return folder / "triangle_attention.cpp"


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> AscendOperator:
    """The operator with each of the mutations as a kernel, compiled in one file: that is quick."""
    folder = tmp_path_factory.mktemp("mutants")
    lines = ['#include "run_operator.h"', "#define DTYPE_QUERY half"]
    for number, name in enumerate(MUTATIONS):
        kernel = mutate(MUTATIONS[name], folder / name)
        lines.append(MUTANT.format(number=number, kernel=kernel))
    entries = ", ".join(f"triangle_attention_{number}" for number in range(len(MUTATIONS)))
    lines.append(f"const Kernel kKernels[] = {{{entries}}};\n")
    source = folder / "mutants.cc"
    source.write_text("\n".join(lines))
    library = compile_library(source, folder / "mutants.so", ("-O0",))
    return AscendOperator(library, {name: number for number, name in enumerate(MUTATIONS)})


CASE: Final = Case(
    Attention(AttentionShape(2, 1, 32, 32), TrianglePattern(4, 40, 16)),
    "float16", 1, 150, (290,), 150, None, None, Binding(False, False), 1,
)  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_faults_in_the_kernel_are_found(mutants: AscendOperator, name: str) -> None:
    with pytest.raises(FaultError) as caught:
        mutants(CASE.call, CASE.attention, name)
    assert MUTATIONS[name].said in str(caught.value)
