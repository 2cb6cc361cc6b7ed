"""Run by test_triton.py in triton-ascend's environment: the kernel compiled, without CANN.

It goes through triton-ascend to Ascend's linalg form, then through ascendnpu-ir's compiler up to
the program that only CANN has (hivmc): buffers are planned by then.
"""

from __future__ import annotations

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from trianglemix.custom_ops.ascend.triton_kernel import TILE, triangle_attention_kernel
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

_POINTERS = {"query", "key", "value", "output"}
_FLAGS = (
    "--enable-auto-multi-buffer=true",
    "--enable-auto-bind-sub-block=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
    "--mlir-print-ir-after=hivm-plan-memory",
)
_PLANNED = "IR Dump After PlanMemory"


def linalg_form(tile: tuple[int, int], dtype: str = "bf16", head_size: int = 128) -> str:
    """The kernel as triton-ascend hands it to Ascend's compiler."""
    constants = {
        "D": head_size, "DV": head_size, "WIDTH": head_size, "VALUE_WIDTH": head_size,
        "ROWS": tile[0], "KEYS": tile[1], "HAS_SOFTCAP": False,
    }  # fmt: skip
    types = {name: "i32" for name in triangle_attention_kernel.arg_names if name not in constants}
    types |= {name: f"*{dtype}" for name in _POINTERS}
    types |= {"first_valid": "*i32", "prompt_length": "*i32", "scale": "fp32", "softcap": "fp32"}
    target = GPUTarget("npu", "Ascend910B3", 0)
    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ASTSource(triangle_attention_kernel, types, constants).make_ir(
        options, backend.get_codegen_implementation(), backend.get_module_map(), context
    )
    stages: dict = {}
    backend.add_stages(stages, options)
    metadata = {"target": target, **vars(options)}
    return stages["ttadapter"](stages["ttir"](module, metadata), metadata)


def plan_buffers(linalg: str, soc: str, folder: Path) -> str:
    """What ascendnpu-ir's compiler says on its way to CANN's last stage."""
    spec = find_spec("ascendnpuir")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("ascendnpu-ir is not in this environment: run `make triton-ascend`")
    tools = Path(spec.submodule_search_locations[0]) / "bin"
    source = folder / "kernel.mlir"
    source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))
    done = subprocess.run(
        [tools / "bishengir-compile", source, f"--target={soc}", *_FLAGS, "-o", folder / "kernel"],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert _PLANNED in text, text[-2000:]
    if done.returncode:  # without CANN: the last stage is missing, and nothing else went wrong
        errors = [line for line in text.splitlines() if "error" in line.lower()]
        excused = ("hivmc", "Failed to run BiShengIR pipeline", "Executing:")
        assert all(any(word in line for word in excused) for line in errors), errors
    return text


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_lowers_to_linalg(dtype: str) -> None:
    text = linalg_form((64, 64), dtype)
    assert "func.func @triangle_attention_kernel" in text
    assert len(re.findall(r"linalg\.matmul", text)) == 2
    assert "memref<64x128x" in text


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391", "Ascend950PR_9599"])
def test_the_deployed_tile_fits_the_buffers(soc: str, tmp_path: Path) -> None:
    assert "overflow" not in plan_buffers(linalg_form(TILE), soc, tmp_path).lower()


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391"])
def test_a_larger_tile_does_not_fit(soc: str, tmp_path: Path) -> None:
    """So that the test above can fail."""
    assert "overflow" in plan_buffers(linalg_form((128, 128)), soc, tmp_path).lower()
