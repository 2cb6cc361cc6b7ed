"""Quantized weights as plain ones give what ONNX Runtime's own operators give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.targets.ascend import weight_files
from trianglemix.exporter.targets.ascend.dequantize import DequantizePass
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import export_ascend, last_logits, prompt, tiny_source
from tests.exporter.targets.ascend.half_model import load_whole

N, K, BLOCK, ROWS = 24, 80, 32, 5
BLOCKS = -(-K // BLOCK)
RANDOM = np.random.default_rng(0)


def quantized(
    bits: int, zero_points: np.ndarray | None = None, bias: bool = False, **more: int
) -> onnx.ModelProto:
    """One MatMulNBits of random levels."""
    constants = {
        "levels": RANDOM.integers(0, 256, (N, BLOCKS, BLOCK * bits // 8), np.uint8),
        "scales": RANDOM.standard_normal((N, BLOCKS)).astype(np.float32),
    }
    names = ["x", "levels", "scales", "", "", ""]
    if zero_points is not None:
        constants["zero_points"], names[3] = zero_points, "zero_points"
    if more.pop("order", 0):
        constants["order"], names[4] = np.arange(BLOCKS * BLOCK, dtype=np.int32) // BLOCK, "order"
    if bias:
        constants["bias"], names[5] = RANDOM.standard_normal(N).astype(np.float32), "bias"
    attributes = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, "accuracy_level": 1} | more
    node = helper.make_node(
        "MatMulNBits", names, ["y"], name="nbits", domain="com.microsoft", **attributes
    )
    return _model([node], constants, [1, ROWS, K], TensorProto.FLOAT, [1, ROWS, N])


def _model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    dims: list[int],
    kind: int,
    out: list[int],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", kind, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def plain(source: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(source)
    DequantizePass()(model)
    proto = ir.to_proto(model)
    assert not any(node.domain for node in proto.graph.node)
    return proto


@pytest.mark.parametrize(
    "source",
    [
        quantized(4),
        quantized(4, bias=True),
        quantized(8),
        quantized(4, RANDOM.integers(0, 256, (N, -(-BLOCKS // 2)), np.uint8)),
        quantized(4, RANDOM.integers(0, 256, N * -(-BLOCKS // 2), np.uint8)),
        quantized(8, RANDOM.integers(0, 256, (N, BLOCKS), np.uint8)),
        quantized(4, RANDOM.uniform(0, 15, (N, BLOCKS)).astype(np.float32)),
    ],
    ids=["4", "bias", "8", "zero-points", "flat-zero-points", "8-zero-points", "real-zero-points"],
)
def test_product_keeps_its_numbers(source: onnx.ModelProto) -> None:
    x = RANDOM.standard_normal((1, ROWS, K)).astype(np.float32)
    want = run(source, x)
    np.testing.assert_allclose(run(plain(source), x), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("zero_points", [False, True])
def test_lookup_keeps_its_numbers(zero_points: bool) -> None:
    """The levels come reshaped, as in a model whose head and embedding are one weight."""
    constants = {
        "levels": RANDOM.integers(0, 256, (N, 2, BLOCK // 2), np.uint8),
        "shape": np.array([N, BLOCK], np.int64),
        "scales": RANDOM.standard_normal((N, 2)).astype(np.float32),
        "zero_points": RANDOM.integers(0, 256, (N, 1), np.uint8),
    }
    if not zero_points:
        del constants["zero_points"]
    names = ["flat", "x", "scales", *(["zero_points"] if zero_points else [])]
    nodes = [
        helper.make_node("Reshape", ["levels", "shape"], ["flat"]),
        helper.make_node(
            "GatherBlockQuantized", names, ["y"], name="lookup", domain="com.microsoft",
            bits=4, block_size=BLOCK, gather_axis=0, quantize_axis=1,
        ),
    ]  # fmt: skip
    source = _model(nodes, constants, [1, ROWS], TensorProto.INT64, [1, ROWS, 2 * BLOCK])
    x = RANDOM.integers(0, N, (1, ROWS))
    np.testing.assert_allclose(run(plain(source), x), run(source, x), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (quantized(4, order=1), "node nbits reorders its weight's columns"),
        (quantized(2), r"node nbits \(MatMulNBits\) has 2 bits"),
    ],
)
def test_other_forms_are_refused_by_name(source: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        DequantizePass()(ir.from_proto(source))


def test_the_three_graphs_share_one_plain_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model whose head is quantized: one file for it, and a note that says so."""
    monkeypatch.setattr(weight_files, "_KEEP_INLINE_BYTES", 1000)
    model = load_whole(tiny_source())
    head = next(n for n in model.graph.node if model.graph.output[0].name in n.output)
    assert head.op_type == "MatMul"
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    width, vocabulary = numpy_helper.to_array(weights[head.input[1]]).shape
    blocks = -(-width // BLOCK)
    levels = RANDOM.integers(0, 256, (vocabulary, blocks, BLOCK // 2), np.uint8)
    scales = (RANDOM.standard_normal((vocabulary, blocks)) / 50).astype(np.float32)
    for name, array in (("head_levels", levels), ("head_scales", scales)):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.initializer.remove(weights[head.input[1]])
    node = helper.make_node(
        "MatMulNBits", [head.input[0], "head_levels", "head_scales"], list(head.output),
        name="quantized_head", domain="com.microsoft", K=width, N=vocabulary, bits=4,
        block_size=BLOCK, accuracy_level=1,
    )  # fmt: skip
    head.CopyFrom(node)
    (tmp_path / "source").mkdir()
    onnx.save(model, tmp_path / "source" / "model.onnx")
    report = export_ascend(tmp_path / "source" / "model.onnx", tmp_path / "out")
    assert any("quantized weights of 1 nodes are plain" in note for note in report.notes)
    logits = last_logits(TriangleSession.from_folder(tmp_path / "out"), prompt(60))
    assert np.isfinite(logits).all()
    files = [f for f in (tmp_path / "out" / "weights").iterdir()
             if f.stat().st_size == width * vocabulary * 4]  # fmt: skip
    assert len(files) == 2  # the head for all three graphs, and the embedding of as many numbers
