"""Runs saved calls of models with the ONNX Runtime that it finds, and prints how far off each is.

    python -m tests.versions.run_cases FOLDER

Each folder in FOLDER holds `model.onnx` and `calls.npz`: `CALL/in/NAME`, `CALL/out/NAME`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from trianglemix.custom_ops.library import library_path


def main() -> None:
    """The last line printed is JSON: the version, and an error or a message per case."""
    off: dict[str, float | str] = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        for kernel in (True, False):
            name = f"{folder.name}/{'kernel' if kernel else 'body'}"
            try:
                off[name] = _error(folder, kernel=kernel)
            except Exception as error:  # ONNX Runtime's errors share no base class of their own
                off[name] = str(error).splitlines()[0][:200]
    print(json.dumps({"version": ort.__version__, "off": off}))


def _error(folder: Path, *, kernel: bool) -> float:
    """The largest difference in any call, as a share of the largest number; infinite for a NaN."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if kernel:
        options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    known = {value.name for value in session.get_inputs()}
    worst = 0.0
    with np.load(folder / "calls.npz") as saved:
        for call in sorted({key.split("/")[0] for key in saved}):
            parts = {key.split("/", 2)[1:][1]: saved[key] for key in saved
                     if key.startswith(f"{call}/in/")}  # fmt: skip
            mask = parts["attention_mask"]
            (got,) = session.run(["logits"], {x: y for x, y in parts.items() if x in known})
            wanted = saved[f"{call}/out/logits"]
            real = mask[:, -wanted.shape[1] :] > 0
            error = float(np.abs(got - wanted)[real].max()) / float(np.abs(wanted[real]).max())
            worst = max(worst, error if np.isfinite(got[real]).all() else float("inf"))
    return worst


if __name__ == "__main__":
    main()
