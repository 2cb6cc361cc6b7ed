"""What static graphs over one cache cannot carry is refused with what to do about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.patterns._example import build_example, decomposed_attention

from tests.exporter.exports import save_example
from tests.exporter.patterns.spellings import Spelling, spelled
from tests.exporter.targets.ascend.test_verify_static import verified

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def _with_input(value: ir.Value, scalar: bool = False) -> ir.Model:
    """The example decoder, the logits of which depend on one more input."""
    model = build_example(decomposed_attention, opset=18).model
    graph = model.graph
    graph.inputs.append(value)
    build = GraphBuilder(graph, "test")
    number = build.op("ReduceSum", build.cast(value, _FLOAT), keepdims=0) if not scalar else value
    old = graph.outputs[0]
    head = old.producer()
    assert head is not None
    logits = build.op("Add", old, build.op("Mul", number, build.constant("none", _zero())))
    logits.name, logits.type, logits.shape = "logits", old.type, old.shape
    old.name = "before"
    graph.extend(build.nodes)
    graph.outputs[0] = logits
    return model


def _zero() -> np.ndarray:
    return np.array(0, np.float32)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "advice"),
    [
        ("position_ids_3d", _INT64, [3, "batch", "sequence"], "sections for images and text"),
        ("past_conv.0", _FLOAT, ["batch", 8, 3], "a state besides keys and values"),
        ("temperature", _FLOAT, [], "export without that input"),
    ],
)
def test_other_inputs(
    name: str, dtype: ir.DataType, shape: list[str | int], advice: str, tmp_path: Path
) -> None:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    path = save_example(_with_input(value, scalar=not shape), tmp_path / "source")
    with pytest.raises(RefusedError, match=advice) as caught:
        verified(path, tmp_path / "out")
    assert "--target cpu" in str(caught.value)


@pytest.mark.parametrize("types", ["half_cache", "float_cache"])
def test_caches_of_another_type_than_the_attention(types: str, tmp_path: Path) -> None:
    """The package has a cache of its own, in the type that the attention computes in."""
    path = save_example(spelled(Spelling(types=types)).model, tmp_path / "source")
    report = verified(path, tmp_path / "out")
    assert all(check.passed for check in report.verification)


@pytest.mark.parametrize("kind", ["Slice", "Gather"])
def test_a_source_that_keeps_its_last_row_itself(kind: str, tmp_path: Path) -> None:
    """The last row of a tail may be padding: the row is picked by the prompt's length instead."""
    model = build_example(decomposed_attention, opset=18).model
    graph = model.graph
    head = graph.outputs[0].producer()
    assert head is not None
    build = GraphBuilder(graph, "test")
    ends = build.ints(2**31 - 1)
    hidden = head.inputs[0]
    last = (
        build.op("Slice", hidden, build.ints(-1), ends, build.ints(1))
        if kind == "Slice"
        else build.op("Gather", hidden, build.ints(-1), axis=1)
    )
    graph.insert_before(head, build.nodes)
    head.replace_input_with(0, last)
    graph.outputs[0].shape = ir.Shape(["batch", 1, 61])
    path = save_example(model, tmp_path / "source")
    assert all(check.passed for check in verified(path, tmp_path / "out").verification)
