"""float16 and bfloat16 sources: probed in float32, exported as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.exporter.graph.walk import dtype_of
from trianglemix.exporter.options import PatternRequest
from trianglemix.exporter.patterns._softmax_measure import _snapped
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.verify.rounding import coarsest_type
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example
from tests.exporter.patterns.spellings import Spelling, spelled


def half_example(dtype: ir.DataType) -> ir.Model:
    """The softmax example with all its floats in `dtype`."""
    model = PATTERN.example().model
    graph = model.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            array = np.maximum(tensor.numpy(), -65504.0)  # the least float16
            value.const_value = ir.tensor(array.astype(dtype.numpy()), dtype=dtype)
            value.type = ir.TensorType(dtype)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(dtype)
    return model


def test_float16_keeps_its_numbers(tmp_path: Path) -> None:
    path = save_example(half_example(ir.DataType.FLOAT16), tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(0, 1), pattern=PatternRequest(4, 64, 8))
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.cache_dtype == "float16"
    ids = random_ids(1, 40)
    expected = Session(path, manifest).logits(ids)
    for kernel in (True, False):
        session = Session.of(tmp_path / "out", kernel=kernel)
        assert session.logits(ids).dtype == np.float16
        assert_close(session.logits(ids), expected, 1e-2)


def test_bfloat16_is_probed_although_the_cpu_cannot_run_it(tmp_path: Path) -> None:
    path = save_example(half_example(ir.DataType.BFLOAT16), tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(1,), target="cuda")
    assert Manifest.load(tmp_path / "out").cache_dtype == "bfloat16"
    assert {row.scale for row in report.layers} == {0.25}
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert {value.dtype for value in graph.outputs} == {ir.DataType.BFLOAT16}


@pytest.mark.parametrize("size", [32, 80, 96, 128, 192])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_a_rounded_scale_is_snapped(size: int, dtype: ir.DataType) -> None:
    rounded = float(np.float32(size**-0.5).astype(dtype.numpy()))
    root = float(np.sqrt(np.float32(size**-0.5)).astype(dtype.numpy()))
    assert _snapped(rounded, size, dtype) == size**-0.5
    assert _snapped(root * root, size, dtype) == size**-0.5
    assert _snapped(1.1 * size**-0.5, size, dtype) == 1.1 * size**-0.5
    other = 1.001 * size**-0.5
    assert _snapped(other, size, ir.DataType.FLOAT) == other


def test_how_close_depends_on_what_the_model_rounds_to(tmp_path: Path) -> None:
    """A float16 graph with float32 caches and logits is compared as float16."""
    example = spelled(Spelling(types="half_inside"))
    path = save_example(example.model, tmp_path / "source")
    assert coarsest_type(path, "float32") == "float16"
    report = export_to(path, tmp_path / "out", layers=(1,), verify=True)
    assert all(check.passed for check in report.verification)
    plain = save_example(spelled(Spelling()).model, tmp_path / "plain")
    assert coarsest_type(plain, "float32") == "float32"
    assert coarsest_type(plain, "bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("types", "computed"),
    [("half_cache", ir.DataType.FLOAT), ("float_cache", ir.DataType.FLOAT),
     ("half_inside", ir.DataType.FLOAT16), ("half_all_float_softmax", ir.DataType.FLOAT16)],
)  # fmt: skip
def test_mixed_types_are_computed_in_one(types: str, computed: ir.DataType, tmp_path: Path) -> None:
    """In the type in which the cache is appended to, or in float32 where the products are in it."""
    path = save_example(spelled(Spelling(types=types)).model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(1,))
    for node in ir.load(tmp_path / "out" / "model.onnx").graph:
        if node.op_type == "TriangleAttention":
            assert {dtype_of(value) for value in node.inputs[3:5]} == {computed}
