"""On an NPU: offline models beside ONNX Runtime on the same graphs, and dense beside triangle.

python tests/hardware/ascend_compare.py TRIANGLE_FOLDER DENSE_FOLDER RESULT.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from trianglemix.runtime.session import TriangleSession

LENGTHS: Final = (5, 127, 129, 700, 1500)
TIMED: Final = (1024, 2900, 7900)
_TOKENS: Final = 8
_REPEATS: Final = 3
_TOLERANCE: Final = {"float32": 2e-3, "float16": 5e-2}  # of the largest logit


def main(triangle: Path, dense: Path, result: Path) -> int:
    """Writes the figures; the exit code is 1 where the NPU's numbers are off."""
    comparisons = [_compare(folder, length) for folder in (triangle, dense) for length in LENGTHS]
    figures: dict[str, Any] = {
        "comparisons": comparisons,
        "prefill_s": {
            folder.name: {str(length): _prefill(folder, length) for length in TIMED}
            for folder in (triangle, dense)
        },
    }
    result.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return 0 if all(row["passed"] for row in comparisons) else 1


def _compare(folder: Path, length: int) -> dict[str, Any]:
    npu, cpu = (TriangleSession.from_folder(folder, provider=name) for name in ("npu", "cpu"))
    ids = _prompt(length)
    got, want = _logits(npu, ids), _logits(cpu, ids)
    error = float(np.abs(got - want).max())
    limit = _TOLERANCE[npu.manifest.cache_dtype] * float(np.abs(want).max())
    tokens = [session.generate(ids, _TOKENS).ids for session in (npu, cpu)]
    return {
        "folder": folder.name,
        "tokens": length,
        "max_error": error,
        "limit": limit,
        "same_tokens": tokens[0] == tokens[1],
        "passed": bool(np.isfinite(got).all()) and error <= limit,
    }


def _prefill(folder: Path, length: int) -> float:
    """Median seconds of a prompt on the NPU, the first run left aside."""
    session = TriangleSession.from_folder(folder, provider="npu")
    times = []
    for _ in range(_REPEATS + 1):
        begun = time.perf_counter()
        _logits(session, _prompt(length))
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _prompt(length: int) -> NDArray[np.int64]:
    return np.random.default_rng(length).integers(0, 1000, length)


def _logits(session: TriangleSession, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    logits = session.new_cache().extend(ids[None], None, len(ids))
    assert logits is not None
    return logits


if __name__ == "__main__":
    sys.exit(main(*(Path(argument) for argument in sys.argv[1:4])))
