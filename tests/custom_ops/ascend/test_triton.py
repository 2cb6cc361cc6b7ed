"""The Triton kernel for Ascend, in an environment of its own: `make triton-ascend` makes it.

triton-ascend's interpreter needs numpy 2.2, which the project's environment has passed.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[3]
PYTHON: Final = ROOT / "build" / "triton-ascend" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(),
    reason="the Triton kernel is not tested: no build/triton-ascend, run `make triton-ascend`",
)


@pytest.mark.parametrize(
    ("cases", "interpret"), [("triton_cases.py", "1"), ("triton_compile_cases.py", "0")]
)
def test_in_its_own_environment(cases: str, interpret: str) -> None:
    path = Path(__file__).with_name(cases)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'package'}:{ROOT}",
        "TRITON_INTERPRET": interpret,
    }
    done = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
