"""Sources without position_ids, which count positions from the length of their cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from trianglemix.exporter.errors import RefusedError
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import (
    export_ascend,
    export_pair,
    last_logits,
    prompt,
    tiny_source,
)
from tests.exporter.targets.ascend.half_model import load_whole


def without_positions(target: Path, offset: int = 0) -> Path:
    """The tiny Llama, its positions counted in the graph from the past's length plus `offset`."""
    model = load_whole(tiny_source("llama", "torchscript-18"))
    graph = model.graph
    assert "position_ids" in [value.name for value in graph.input]
    past = next(value.name for value in graph.input if "past" in value.name)
    constants = {"axis_2": [2], "axis_1": [1], "axis_0": [0], "one": 1, "offset": [offset]}
    for name, number in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), name))
    nodes = [
        helper.make_node("Shape", [past], ["past_shape"]),
        helper.make_node("Gather", ["past_shape", "axis_2"], ["held"]),
        helper.make_node("Add", ["held", "offset"], ["begin"]),
        helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        helper.make_node("Gather", ["ids_shape", "axis_1"], ["length"]),
        helper.make_node("Add", ["begin", "length"], ["end"]),
        helper.make_node("Squeeze", ["begin", "axis_0"], ["begin_scalar"]),
        helper.make_node("Squeeze", ["end", "axis_0"], ["end_scalar"]),
        helper.make_node("Range", ["begin_scalar", "end_scalar", "one"], ["counted"]),
        helper.make_node("Unsqueeze", ["counted", "axis_0"], ["position_ids"]),
    ]
    graph.input.remove(next(v for v in graph.input if v.name == "position_ids"))
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    target.mkdir()
    onnx.save(model, target / "model.onnx")
    return target / "model.onnx"


def test_positions_count_from_start(tmp_path: Path) -> None:
    made = export_pair(without_positions(tmp_path / "source"), tmp_path)
    export_ascend(tiny_source("llama", "torchscript-18"), tmp_path / "given")
    ascend, cpu, given = (
        TriangleSession.from_folder(path) for path in (made.ascend, made.cpu, tmp_path / "given")
    )
    for length in (5, 17, 83):
        ids = prompt(length)
        assert ascend.generate(ids, 5).ids == cpu.generate(ids, 5).ids
        assert np.abs(last_logits(ascend, ids) - last_logits(given, ids)).max() < 1e-5


def test_what_counts_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    source = without_positions(tmp_path / "source", offset=2)
    with pytest.raises(RefusedError, match="reads attention_mask outside of attention"):
        export_ascend(source, tmp_path / "out")
