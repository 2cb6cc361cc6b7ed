"""The tool that takes every source through the Ascend export: clean, wrong and refused cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.exporter.targets.ascend import source_matrix
from tests.exporter.targets.ascend.exported import tiny_source
from tests.exporter.targets.ascend.half_model import load_whole
from tests.exporter.targets.ascend.source_matrix import Cell, lint_folder, measure, table


@pytest.mark.parametrize(
    ("family", "route"),
    [("qwen2", "gqa"), ("qwen3", "dynamo-sdpa-20"), ("llama", "torchscript-18")],
)
def test_a_source_is_clean(family: str, route: str, tmp_path: Path) -> None:
    cell = measure(tiny_source(family, route), tmp_path)
    assert (cell.status, cell.findings) == ("clean", ())
    assert 0 < cell.error < 1e-5


def test_other_numbers_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_logits = source_matrix.last_logits

    def spoiled(session: object, ids: list[int]) -> np.ndarray:
        logits = last_logits(session, ids)  # type: ignore[arg-type]
        return logits * (1.01 if session.kernel == "static" else 1.0)  # type: ignore[attr-defined]

    monkeypatch.setattr(source_matrix, "last_logits", spoiled)
    assert measure(tiny_source(), tmp_path).status == "wrong"


def test_findings_are_wrong(tmp_path: Path) -> None:
    """A graph that was changed after its export: an infinity in a mask."""
    measure(tiny_source(), tmp_path)
    file = tmp_path / "ascend" / "tail.onnx"
    model = onnx.load(file, load_external_data=False)
    floor = numpy_helper.from_array(np.array([-np.inf], np.float32), "floor")
    model.graph.initializer.append(floor)
    file.write_bytes(model.SerializeToString())
    assert lint_folder(tmp_path / "ascend") == ["infinity"]


def test_refusals_keep_their_reason(tmp_path: Path) -> None:
    model = load_whole(tiny_source())
    logits = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == logits else name for name in node.output]
    size = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.float32), "bias"))
    model.graph.node.append(
        onnx.helper.make_node("BiasGelu", ["before", "bias"], [logits], domain="com.microsoft")
    )
    (tmp_path / "source").mkdir()
    onnx.save(model, tmp_path / "source" / "model.onnx")
    cell = measure(tmp_path / "source" / "model.onnx", tmp_path)
    assert cell.status == "refused"
    assert "com.microsoft::BiasGelu" in cell.reason


def test_the_table_numbers_equal_reasons_once() -> None:
    results = {
        "optimum/llama": Cell("clean", error=2e-6),
        "optimum/qwen2": Cell("refused", "node a/b (NonZero) depends on data"),
        "mobius/llama": Cell("refused", "node c/d (NonZero) depends on data"),
        "mobius/qwen2": Cell("not made"),
    }
    lines = table(results).splitlines()
    assert lines[2:] == [
        "| `optimum` | 1: llama | 2e-06 | qwen2 (1) |",
        "| `mobius` | 0: - | - | llama (1) |",
        "",
        "1. a node (NonZero) depends on data",
    ]
