"""The compiler's report of the hot CUDA kernels: no register spills, no matrix product waits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "custom_ops" / "src"
HOT = re.compile(r"(attention|choice)_sm90I\w+Li128E")
SOURCE = """
#include "block_sparse/cuda/choice_sm90.cuh"
#include "cuda/attention_sm90.cuh"
namespace trianglemix {
template <Layout kLayout> using AttentionParams = ParamsOf<Sm90Params, kLayout>;
template <Layout kLayout> using ChoiceParamsOf = ParamsOf<ChoiceSm90Params, kLayout>;
#define ATTENTION(T, SCHEDULE, LAYOUT) template __global__ void \\
    attention_sm90<T, 128, Schedule::SCHEDULE, Layout::LAYOUT>( \\
        const __grid_constant__ AttentionParams<Layout::LAYOUT>);
#define CHOICE(T, ROWS, LAYOUT) template __global__ void \\
    choice_sm90<T, ChoiceTile<128, ROWS>, Layout::LAYOUT>( \\
        const __grid_constant__ ChoiceParamsOf<Layout::LAYOUT>);
#define LAYOUTS(T, LAYOUT) ATTENTION(T, kBlocks, LAYOUT) \\
    CHOICE(T, 64, LAYOUT) CHOICE(T, 128, LAYOUT) CHOICE(T, 192, LAYOUT)
#define KERNELS(T) ATTENTION(T, kRanges, kWhole) LAYOUTS(T, kWhole) LAYOUTS(T, kPages)
KERNELS(__half)
KERNELS(__nv_bfloat16)
}  // namespace trianglemix
"""
KERNELS = 18


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What nvcc says of the kernels of head size 128."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    source = tmp_path_factory.mktemp("cuda") / "hot.cu"
    source.write_text(SOURCE)
    command = [
        nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v",
        f"-I{FOLDER}", "-c", str(source), "-o", str(source.with_suffix(".o")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_hot_kernel_does_not_spill(report: str) -> None:
    found = re.findall(
        r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores",
        report,
    )
    hot = [(name, int(stack), int(spills)) for name, stack, spills in found if HOT.search(name)]
    assert len(hot) == KERNELS, f"expected {KERNELS} kernels, found {hot}:\n{report}"
    assert all(spills == 0 for _, _, spills in hot), hot
    # Choosing calls a function, and gives it the work item in memory.
    assert all(stack == 0 for name, stack, _ in hot if "attention" in name), hot


def test_no_matrix_product_is_serialized(report: str) -> None:
    """ptxas says so when it cannot keep the products of a warpgroup in flight (C75xx)."""
    assert "wgmma" not in report, report


def test_work_items_visit_every_row_and_block_once(tmp_path: Path) -> None:
    """The integers of the kernels' plans, which need no GPU."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    program = tmp_path / "check_items"
    sources = [
        Path(__file__).parent / "cuda_items" / "check_items.cu",
        FOLDER / "cuda" / "plan.cu",
        FOLDER / "block_sparse" / "cuda" / "choice_plan.cu",
    ]
    command = [nvcc, "-std=c++17", "-O1", "-arch=sm_80", f"-I{FOLDER}", "-o", str(program)]
    done = subprocess.run(
        [*command, *map(str, sources)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout
