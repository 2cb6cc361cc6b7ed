"""An operator is added with folders of its own and a line in `operators.inc`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import trianglemix.custom_ops
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from trianglemix.custom_ops import contract, operators
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention
from trianglemix.exporter.rewrite.drop_unused import DropUnusedPass

from benchmarks.kernel_variants import SOURCE, run_cmake
from tests.custom_ops.operator_session import (
    Backend,
    attributes_of,
    build_model,
    feeds_of,
    open_session,
)
from tests.custom_ops.tolerances import assert_close

TOY = Path(__file__).parent / "toy_operator"
ATTENTION = Attention(AttentionShape(4, 2, 16, 16), TrianglePattern(2, 9, 5))
TOKENS = 40


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library from a copy of its sources with the toy's folder and its line."""
    folder = tmp_path_factory.mktemp("library")
    copy = Path(shutil.copytree(SOURCE, folder / "custom_ops", ignore=lambda *_: {"ascend"}))
    shutil.copytree(TOY, copy / "src" / "toy_operator")
    with (copy / "src" / "operators.inc").open("a") as operators:
        operators.write("TRIANGLEMIX_OPERATOR(ToyOperator)\n")
    options = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CUDA_COMPILER=NOTFOUND"]
    run_cmake(["-S", str(copy), "-B", str(folder / "build"), "-G", "Ninja", *options])
    run_cmake(["--build", str(folder / "build"), "--target", "trianglemix_ops", "--parallel", "2"])
    return folder / "build" / "libtrianglemix_ops.so"


@pytest.fixture
def call() -> Call:
    random = np.random.default_rng(3)
    query, key, value = (
        random.standard_normal((1, TOKENS, heads * 16)).astype(np.float32) for heads in (4, 2, 2)
    )
    past = np.zeros((1, 2, 0, 16), np.float32)
    length = np.array([TOKENS], np.int32)
    return Call(query, key, value, past, past, length - 1, TOKENS, length, np.zeros(1, np.int32))


def model_of_both() -> onnx.ModelProto:
    """The toy's output is the attention's query."""
    model = build_model(attributes_of(ATTENTION), "float32")
    model.graph.node[0].input[0] = "scaled"
    toy = helper.make_node("ToyOperator", ["query", "factor"], ["scaled"], domain=contract.DOMAIN)
    model.graph.node.insert(0, toy)
    model.graph.input.append(helper.make_tensor_value_info("factor", TensorProto.INT32, []))
    return model


def test_it_runs_beside_the_others(library: Path, call: Call) -> None:
    session = open_session(model_of_both(), Backend(library))
    output = session.run(None, {**feeds_of(call), "factor": np.array(3, np.int32)})[0]
    expected = triangle_attention(replace(call, query=call.query * 3), ATTENTION)[0]
    assert_close(output, expected, "float32")


def test_its_errors_bear_its_name(library: Path, call: Call) -> None:
    session = open_session(model_of_both(), Backend(library))
    with pytest.raises(ort_errors.InvalidArgument, match="ToyOperator: factor is 0, but must be 1"):
        session.run(None, {**feeds_of(call), "factor": np.array(0, np.int32)})


@pytest.fixture
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's folder stands beside the others'."""
    folders = [*trianglemix.custom_ops.__path__, str(TOY.parent)]
    monkeypatch.setattr(trianglemix.custom_ops, "__path__", folders)
    monkeypatch.setattr(operators, "folders", operators.folders.__wrapped__)  # not the cached one


@pytest.mark.usefixtures("_listed")
def test_models_carry_what_it_means(call: Call) -> None:
    model = ir.from_proto(model_of_both())
    operators.add_function(model, "ToyOperator")
    session = open_session(ir.to_proto(DropUnusedPass()(model).model), Backend(None))
    output = session.run(None, {**feeds_of(call), "factor": np.array(3, np.int32)})[0]
    expected = triangle_attention(replace(call, query=call.query * 3), ATTENTION)[0]
    assert_close(output, expected, "float32")


@pytest.mark.usefixtures("_listed")
def test_what_it_means_goes_with_its_last_node() -> None:
    model = ir.from_proto(build_model(attributes_of(ATTENTION), "float32"))
    operators.add_function(model, "ToyOperator")
    DropUnusedPass()(model)
    assert [name for _, name, _ in model.functions] == ["TriangleAttention"]
