"""Spelled-out operators give what ONNX Runtime's own give; newer opsets come down, or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.targets.ascend.lower_opset import LowerOpsetPass
from trianglemix.exporter.targets.ascend.standard_ops import SPELLINGS, SpellOutPass
from trianglemix.exporter.targets.ascend.static_shapes import FoldStaticShapesPass

MICROSOFT = "com.microsoft"
ROWS, HEADS, SIZE, TABLE = 5, 3, 16, 11


@dataclass(frozen=True)
class Op:
    """A node over `x` (and more inputs, which are constants)."""

    op_type: str
    domain: str = ""
    opset: int = 18
    shape: tuple[int, ...] = (1, ROWS, HEADS * SIZE)
    constants: tuple[np.ndarray, ...] = ()
    outputs: tuple[str, ...] = ("y",)
    attributes: dict[str, Any] = field(default_factory=dict)


def _table(width: int = SIZE // 2) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(TABLE)[:, None] * 0.7 ** np.arange(width)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


POSITIONS = np.arange(4, 4 + ROWS).reshape(1, -1).astype(np.int64)
GAMMA = np.linspace(0.5, 2, HEADS * SIZE).astype(np.float32)
SKIP = np.linspace(-1, 1, ROWS * HEADS * SIZE).astype(np.float32).reshape(1, ROWS, -1)
SQUARE = np.linspace(-1, 1, ROWS * ROWS).astype(np.float32).reshape(ROWS, ROWS)
APART = (1, HEADS, ROWS, SIZE)
NARROW = _table(4)
OPS = [
    Op("RMSNormalization", opset=23, constants=(GAMMA,), attributes={"epsilon": 0.1}),
    Op("RMSNormalization", opset=23, constants=(GAMMA,), attributes={"axis": 2}),
    Op("SimplifiedLayerNormalization", constants=(GAMMA,), attributes={"epsilon": 0.1}),
    Op("SimplifiedLayerNormalization", opset=17, constants=(GAMMA,)),
    Op("SkipSimplifiedLayerNormalization", MICROSOFT, constants=(SKIP, GAMMA, GAMMA),
       outputs=("y", "", "", "sum"), attributes={"epsilon": 0.1}),
    Op("SkipLayerNormalization", MICROSOFT, constants=(SKIP, GAMMA, GAMMA + 1, GAMMA - 1),
       outputs=("y", "", "", "sum"), attributes={"epsilon": 0.1}),
    Op("SkipLayerNormalization", MICROSOFT, constants=(SKIP, GAMMA, GAMMA + 1)),
    Op("FusedMatMul", MICROSOFT, shape=(1, ROWS, ROWS), constants=(SQUARE,),
       attributes={"alpha": 0.3, "transB": 1}),
    Op("FusedMatMul", MICROSOFT, shape=(1, ROWS, ROWS), constants=(SQUARE,),
       attributes={"transA": 1}),
    Op("RotaryEmbedding", MICROSOFT, constants=(POSITIONS, *_table()),
       attributes={"num_heads": HEADS}),
    Op("RotaryEmbedding", MICROSOFT, shape=APART, constants=(POSITIONS, *_table())),
    Op("RotaryEmbedding", MICROSOFT, constants=(POSITIONS, *_table()),
       attributes={"num_heads": HEADS, "interleaved": 1}),
    Op("RotaryEmbedding", MICROSOFT, constants=(POSITIONS, *NARROW),
       attributes={"num_heads": HEADS, "rotary_embedding_dim": 8}),
    Op("RotaryEmbedding", opset=23, shape=APART, constants=(*_table(), POSITIONS)),
    Op("RotaryEmbedding", opset=23, constants=(*_table(), POSITIONS),
       attributes={"num_heads": HEADS}),
    Op("RotaryEmbedding", opset=23, shape=APART,
       constants=tuple(table[None, 2 : 2 + ROWS] for table in _table())),
    Op("Gelu", opset=20),
    Op("Gelu", opset=20, attributes={"approximate": "tanh"}),
    Op("Gelu", MICROSOFT),
    Op("FastGelu", MICROSOFT, constants=(GAMMA,)),
    Op("QuickGelu", MICROSOFT, attributes={"alpha": 1.3}),
]  # fmt: skip


def model_of(op: Op) -> onnx.ModelProto:
    names = [f"c{index}" for index in range(len(op.constants))]
    node = helper.make_node(
        op.op_type, ["x", *names], list(op.outputs), name="fused", domain=op.domain,
        **op.attributes,
    )  # fmt: skip
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, op.shape)
        for name in op.outputs
        if name
    ]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, op.shape)],
        outputs,
        [numpy_helper.from_array(x, name) for x, name in zip(op.constants, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", op.opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.domain or 'onnx'}-{op.op_type}")
def test_spelled_out_operators_keep_their_numbers(op: Op) -> None:
    x = np.random.default_rng(0).standard_normal(op.shape).astype(np.float32)
    source = model_of(op)
    model = ir.from_proto(source)
    SpellOutPass()(model)
    FoldStaticShapesPass({"x": op.shape})(model)
    LowerOpsetPass()(model)
    assert {node.domain for node in model.graph} == {""}
    assert model.graph.opset_imports[""] <= 18
    for got, want in zip(run(ir.to_proto(model), x), run(source, x), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6)


def test_every_spelling_is_tested() -> None:
    """Swish is opset 24's, and the norm's other domain only an alias."""
    untested = {("", "Swish"), (MICROSOFT, "SimplifiedLayerNormalization")}
    assert set(SPELLINGS) == {(op.domain, op.op_type) for op in OPS} | untested


def test_positions_beyond_a_table_take_its_last_row() -> None:
    """Pads behind the end of the context: a lookup must stay inside."""
    tables = _table()
    far = Op("RotaryEmbedding", MICROSOFT, constants=(POSITIONS + 100, *tables),
             attributes={"num_heads": HEADS})  # fmt: skip
    last = Op("RotaryEmbedding", MICROSOFT, constants=(POSITIONS * 0 + TABLE - 1, *tables),
              attributes={"num_heads": HEADS})  # fmt: skip
    x = np.random.default_rng(0).standard_normal(far.shape).astype(np.float32)
    model = ir.from_proto(model_of(far))
    SpellOutPass()(model)
    np.testing.assert_allclose(run(ir.to_proto(model), x)[0], run(model_of(last), x)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (Op("HardSwish", opset=22), "HardSwish of opset 22, whose meaning"),
        (Op("Softmax", opset=23, attributes={"axis": -1}), None),
        (Op("Cast", opset=24, attributes={"to": 1, "round_mode": "down"}), "round_mode=down"),
        (Op("Cast", opset=24, attributes={"to": 1, "saturate": 1}), None),
    ],
    ids=str,
)
def test_newer_opsets(op: Op, reason: str | None) -> None:
    model = ir.from_proto(model_of(op))
    if reason is None:
        LowerOpsetPass()(model)
        assert model.graph.opset_imports[""] == 18
        onnx.checker.check_model(ir.to_proto(model))
    else:
        with pytest.raises(RefusedError, match=f"node fused .*{reason}"):
            LowerOpsetPass()(model)


def test_a_shape_that_depends_on_values_is_refused_by_name() -> None:
    model = ir.from_proto(model_of(Op("NonZero")))
    with pytest.raises(RefusedError, match="which node fused"):
        FoldStaticShapesPass({"x": (2, 3)})(model)
