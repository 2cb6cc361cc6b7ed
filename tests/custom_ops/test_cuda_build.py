"""The compiler's report of the hot CUDA kernel: no register spills, no matrix product waits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "custom_ops" / "src" / "cuda"
HOT = re.compile(r"attention_sm90I\w+Li128E")
SOURCE = """
#include "attention_sm90.cuh"
namespace trianglemix {
template __global__ void attention_sm90<__half, 128>(const __grid_constant__ Sm90Params);
template __global__ void attention_sm90<__nv_bfloat16, 128>(const __grid_constant__ Sm90Params);
}  // namespace trianglemix
"""


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
    assert len(hot) == 2, f"expected the float16 and the bfloat16 kernel, found {hot}:\n{report}"
    assert all(stack == 0 and spills == 0 for _, stack, spills in hot), hot


def test_no_matrix_product_is_serialized(report: str) -> None:
    """ptxas says so when it cannot keep the products of a warpgroup in flight (C75xx)."""
    assert "wgmma" not in report, report
