"""The structures of the C interface are those of its headers; a wrong library says what it is."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
from trianglemix.custom_ops import cuda_library
from trianglemix.custom_ops.cuda_library import (
    ABI,
    BLOCK_SPARSE,
    TRIANGLE,
    BlockSparseProblem,
    KernelTable,
    KeyPages,
    PageStrides,
    Problem,
    Rotation,
    load_kernels,
)
from trianglemix.custom_ops.library import LibraryNotFoundError

from tests.custom_ops.host_kernels import HEADERS, header_layout, host_library

TYPES: dict[str, Any] = {
    "AttentionProblem": Problem,
    "BlockSparseProblem": BlockSparseProblem,
    "Rotation": Rotation,
    "KeyPages": KeyPages,
    "PageStrides": PageStrides,
    "CudaKernels": KernelTable,
}
PATTERN = {"sink", "window", "last"}


def own_fields(structure: Any) -> list[str]:
    """Its fields' names, those of the structure that it extends included."""
    inherited = own_fields(structure.__base__) if hasattr(structure.__base__, "_fields_") else []
    return [*inherited, *(name for name, _ in structure._fields_)]


def cpp_name(field: str) -> str:
    return f"pattern.{field}" if field in PATTERN else field


def test_the_structures_are_those_of_the_headers(tmp_path: Path) -> None:
    fields = {name: [cpp_name(x) for x in own_fields(s)] for name, s in TYPES.items()}
    expected = header_layout(tmp_path, fields)
    assert expected.pop("abi") == ABI
    ours = {name: ctypes.sizeof(structure) for name, structure in TYPES.items()}
    for name, structure in TYPES.items():
        ours |= {
            f"{name}.{cpp_name(x)}": getattr(structure, x).offset for x in own_fields(structure)
        }
    assert ours == expected


def test_no_member_of_the_headers_is_missing() -> None:
    """Offsets and sizes agree where a member in a gap was forgotten, so names are compared too."""
    text = (HEADERS / "problem.h").read_text(encoding="utf-8")
    body = text[text.index("struct AttentionProblem {") : text.index("bool appends()")]
    members = re.findall(r"^  [\w:]+(?: \w+)?[ *]+(\w+);", re.sub(r"const ", "", body), re.M)
    names = [x for x in own_fields(Problem) if x not in PATTERN]
    assert [x for x in members if x != "pattern"] == names


@pytest.mark.parametrize("operator", [TRIANGLE, BLOCK_SPARSE])
def test_a_library_is_opened(operator: Any, tmp_path: Path) -> None:
    kernels = load_kernels(*operator, host_library(tmp_path))
    problem = kernels.problem()
    assert kernels.workspace_bytes(ctypes.addressof(problem)) > 0


def test_a_missing_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "cuda_library_path", lambda: tmp_path / "none.so")
    with pytest.raises(LibraryNotFoundError, match="is not in this installation"):
        load_kernels.__wrapped__(*TRIANGLE)


def test_a_file_that_is_no_library_says_so(tmp_path: Path) -> None:
    path = tmp_path / "libtrianglemix_cuda.so"
    path.write_text("version https://git-lfs")
    with pytest.raises(LibraryNotFoundError, match=r"cannot be opened .*install the wheel"):
        load_kernels(*TRIANGLE, path)


def test_a_library_without_the_operator_says_so(tmp_path: Path) -> None:
    with pytest.raises(LibraryNotFoundError, match=r"cannot be opened .*trianglemix_cuda_other"):
        load_kernels("trianglemix_cuda_other", Problem, host_library(tmp_path))


def test_a_library_of_other_sources_says_so(tmp_path: Path) -> None:
    older = host_library(tmp_path, "-DHOST_ABI=2")
    with pytest.raises(LibraryNotFoundError, match=f"interface version 2, .* needs {ABI}"):
        load_kernels(*TRIANGLE, older)
