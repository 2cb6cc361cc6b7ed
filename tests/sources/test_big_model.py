"""A model with 5 GB of weights is rewritten beside its data without reading them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export_time import measure_process
from source_models.big_model import make_big_model

_MEMORY = 400 << 20  # bytes, of the whole process
_PROCESSOR_SECONDS = 4.0


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_neither_read_nor_copied(tmp_path: Path, shards: int) -> None:
    size = make_big_model(tmp_path / "big", shards=shards)
    assert size > 5e9
    options = ("--weights", "link")
    cost = measure_process(tmp_path / "big" / "model.onnx", tmp_path / "out", *options)
    assert cost.peak_bytes < _MEMORY
    assert cost.processor_seconds < _PROCESSOR_SECONDS
    names = sorted(path.name for path in (tmp_path / "big").glob("*.data*"))
    assert len(names) == shards
    for name in names:
        source, linked = tmp_path / "big" / name, tmp_path / "out" / name
        assert source.stat().st_ino == linked.stat().st_ino
