"""The hardware scripts where there is no hardware: they skip loudly, and their Python is sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.exporter.targets.ascend.exported import Pair, export_pair, tiny_source
from tests.hardware import ascend_compare
from tests.runtime.test_static_backends import InferSession

SCRIPT = Path(__file__).with_name("ascend.sh")


def test_without_cann_the_script_says_what_it_skips() -> None:
    done = subprocess.run(
        ["sh", str(SCRIPT)], env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 77
    assert done.stderr.startswith("SKIPPED tests/hardware/ascend.sh: no atc on the PATH")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export_pair(tiny_source(), tmp_path_factory.mktemp("hardware"))


@pytest.mark.parametrize("wrong", [False, True])
def test_comparison_with_a_stand_in_for_the_device(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    for name in ("ais_bench", "ais_bench.infer", "ais_bench.infer.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    device = _Wrong if wrong else InferSession
    sys.modules["ais_bench.infer.interface"].InferSession = device  # type: ignore[attr-defined]
    for file in pair.ascend.glob("*.onnx"):
        file.with_suffix(".om").write_text("om")
    monkeypatch.setattr(ascend_compare, "LENGTHS", (5, 60))
    monkeypatch.setattr(ascend_compare, "TIMED", (40,))
    monkeypatch.setattr(ascend_compare, "_prompt", lambda length: np.arange(length) % 200)
    result = tmp_path / "result.json"
    assert ascend_compare.main(pair.ascend, pair.ascend, result) == int(wrong)
    figures = json.loads(result.read_text())
    assert all(row["same_tokens"] != wrong for row in figures["comparisons"])
    assert figures["prefill_s"]["ascend"]["40"] > 0


class _Wrong(InferSession):
    def infer(self, feeds: list[np.ndarray], mode: str) -> list[np.ndarray]:
        outputs = super().infer(feeds, mode)
        return [outputs[0][::-1].copy() * 3, *outputs[1:]]  # the logits, where there are any
