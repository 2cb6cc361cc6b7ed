"""Sources of older opsets: raised to the one that the operator's function needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.normalize.infer_shapes import InferShapesPass
from trianglemix.exporter.normalize.raise_opset import RaiseOpsetPass
from trianglemix.exporter.options import PatternRequest

from tests.exporter.exports import Session, assert_close, export_to, random_ids

_SHAPE = [2, 3, 4]
_TEXT = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
decoder (int64[batch, s] input_ids, int64[batch, t] attention_mask,
         float[batch, 2, p, 16] past_key, float[batch, 2, p, 16] past_value)
     => (float[batch, s, 61] logits, float[batch, 2, t, 16] present_key,
         float[batch, 2, t, 16] present_value) {{
  zero = Constant <value: tensor = int64 {{0}}> ()
  one = Constant <value: tensor = int64 {{1}}> ()
  heads = Constant <value: tensor = int64[4] {{0, 0, 2, 16}}> ()
  flat = Constant <value: tensor = int64[3] {{0, 0, 32}}> ()
  scale = Constant <value: tensor = float {{0.25}}> ()
  least = Constant <value: tensor = float {{-10000}}> ()
  hidden = Gather (table, input_ids)
  q0 = MatMul (hidden, wq)
  k0 = MatMul (hidden, wk)
  v0 = MatMul (hidden, wv)
  q1 = Reshape (q0, heads)
  k1 = Reshape (k0, heads)
  v1 = Reshape (v0, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k = Transpose <perm = [0, 2, 1, 3]> (k1)
  v = Transpose <perm = [0, 2, 1, 3]> (v1)
  present_key = Concat <axis = 2> (past_key, k)
  present_value = Concat <axis = 2> (past_value, v)
  kt = Transpose <perm = [0, 1, 3, 2]> (present_key)
  s0 = MatMul (q, kt)
  s1 = Mul (s0, scale)
  mask_shape = Shape (attention_mask)
  ids_shape = Shape (input_ids)
  total = Gather (mask_shape, one)
  length = Gather (ids_shape, one)
  past = Sub (total, length)
  rows0 = Range (past, total, one)
  keys = Range (zero, total, one)
  rows = Unsqueeze <axes = [1]> (rows0)
  hidden_key = Greater (keys, rows)
  pad0 = Equal (attention_mask, zero)
  pad = Unsqueeze <axes = [1, 2]> (pad0)
  unseen = Or (hidden_key, pad)
  s2 = Where (unseen, least, s1)
  w0 = Softmax <axis = 3> (s2)
  w = Dropout <{ratio}> (w0)
  o0 = MatMul (w, present_value)
  o1 = Transpose <perm = [0, 2, 1, 3]> (o0)
  o2 = Reshape (o1, flat)
  o = MatMul (o2, wo)
  left, right = Split <axis = 2{split}> (o)
  halves = Concat <axis = 2> (left, right)
  logits = MatMul (halves, head)
}}
"""


def _decoder(opset: int, folder: Path) -> Path:
    """A decoder with its axes as attributes before opset 13, of one layer."""
    ratio = "ratio = 0.1" if opset < 12 else "seed = 1"
    text = _TEXT.format(ir=6 if opset < 12 else 7, opset=opset, ratio=ratio,
                        split=", split = [8, 24]" if opset < 13 else "")  # fmt: skip
    text = text if opset < 13 else _with_inputs(text)
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(3)
    sizes = {"table": (61, 32), "wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "wo": (32, 32),
             "head": (32, 61)}  # fmt: skip
    for name, shape in sizes.items():
        weight = random.standard_normal(shape).astype(np.float32) / 4
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _with_inputs(text: str) -> str:
    """The same in opset 13 and later."""
    text = text.replace("Unsqueeze <axes = [1]> (rows0)", "Unsqueeze (rows0, axis_1)")
    text = text.replace("Unsqueeze <axes = [1, 2]> (pad0)", "Unsqueeze (pad0, axes_1_2)")
    more = (
        "  axis_1 = Constant <value: tensor = int64[1] {1}> ()\n"
        "  axes_1_2 = Constant <value: tensor = int64[2] {1, 2}> ()\n  hidden = "
    )
    return text.replace("  hidden = ", more, 1)


@pytest.mark.parametrize("opset", range(11, 17))
def test_a_decoder_of_an_older_opset(opset: int, tmp_path: Path) -> None:
    path = _decoder(opset, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(0,), pattern=PatternRequest(4, 64, 8))
    assert any(f"opset {opset} was raised to 17" in note for note in report.notes)
    ids, mask = random_ids(2, 20), np.ones((2, 20), np.int64)
    mask[1, :3] = 0
    for kernel in (True, False):
        ours = Session.of(tmp_path / "out", kernel=kernel)
        theirs = Session(path, ours.manifest)
        assert_close(ours.logits(ids, mask)[:, 3:], theirs.logits(ids, mask)[:, 3:])


def _run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": x})
    return results


@pytest.mark.parametrize("shaped", [True, False])
@pytest.mark.parametrize("opset", [11, 12])
def test_each_operator_computes_what_it_did(opset: int, shaped: bool) -> None:
    """A softmax over an axis that is not the last ran over all axes from there on."""
    nodes = [
        helper.make_node("Identity", ["x"], ["source"]),
        *(
            helper.make_node(kind, ["source"], [f"{kind}{axis}"], axis=axis)
            for kind in ("Softmax", "LogSoftmax", "Hardmax")
            for axis in (0, 1, 2, -1, -2)
        ),
        helper.make_node("Softmax", ["source"], ["default"]),
        helper.make_node("Unsqueeze", ["source"], ["more"], axes=[0, 2]),
        helper.make_node("Squeeze", ["more"], ["less"], axes=[0]),
        helper.make_node("Squeeze", ["more"], ["least"]),
        helper.make_node("ReduceSum", ["source"], ["sum"], axes=[1], keepdims=0),
        helper.make_node("ReduceSum", ["source"], ["all"]),
        helper.make_node("Split", ["source"], ["a", "b"], axis=1, split=[1, 2]),
        helper.make_node("Split", ["source"], ["c", "d"], axis=2),
    ]
    names = [name for node in nodes[1:] for name in node.output]
    shape = _SHAPE if shaped else None
    graph = helper.make_graph(
        nodes, "old", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
    )  # fmt: skip
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6)
    model = ir.from_proto(old)
    InferShapesPass()(model)
    RaiseOpsetPass()(model)
    new = ir.to_proto(model)
    assert (new.opset_import[0].version, new.ir_version) == (17, 8)
    if shaped:
        onnx.checker.check_model(new, full_check=True)
    x = np.random.default_rng(1).standard_normal(_SHAPE).astype(np.float32)
    for name, a, b in zip(names, _run(new, x), _run(old, x), strict=True):
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


def test_what_means_something_else_now_is_refused() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("RoiAlign", [x, x, x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 14}, name="old")
    with pytest.raises(RefusedError, match="RoiAlign"):
        RaiseOpsetPass()(ir.Model(graph, ir_version=7))
