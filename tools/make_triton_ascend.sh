#!/bin/sh
# Makes build/triton-ascend: triton-ascend with numpy 2.2 and Ascend's open compiler, beside the
# project's own packages (torch, hypothesis, pytest) taken from .venv. Used by the kernel's tests.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
TARGET=build/triton-ascend
[ -x .venv/bin/python ] || { echo "make_triton_ascend.sh: no .venv; run make setup" >&2; exit 1; }
"$PYTHON" -m venv "$TARGET"
"$TARGET/bin/python" -m pip install -q numpy==2.2.6 triton-ascend==3.2.0 ascendnpu-ir==1.2.0 \
  pybind11 pytest
SITE='import sysconfig; print(sysconfig.get_path("purelib"))'
.venv/bin/python -c "$SITE" >"$("$TARGET/bin/python" -c "$SITE")/project_environment.pth"
"$TARGET/bin/python" -c 'import numpy, torch, triton; print("numpy", numpy.__version__,
  "triton-ascend", triton.__version__, "torch", torch.__version__)'
