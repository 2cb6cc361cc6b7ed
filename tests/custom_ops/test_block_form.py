"""Block form against the float64 reference, on ONNX Runtime with standard operators only."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.targets.ascend.block_form import StaticCall

from tests.custom_ops.block_form_case import Case, assert_close, build, expected, inputs, run


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block, blocks = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    rows = block * blocks
    dense_block = draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    start = draw(st.integers(0, 150))
    slots = start + rows + draw(st.integers(0, 40))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1), (9, 3)]))
    sizes = st.integers(1, 10).map(lambda n: 8 * n)
    pattern = TrianglePattern(draw(st.integers(0, 20)), draw(st.integers(1, 90)), 7)
    return Case(
        call=StaticCall(rows, slots, block, dense_block),
        attention=Attention(
            AttentionShape(heads, kv_heads, draw(sizes), draw(sizes)),
            pattern,
            scale=draw(st.sampled_from([0.0, 0.3])),
            softcap=draw(st.sampled_from([0.0, 2.0])),
        ),
        start=start,
        banded=draw(st.booleans()),
        dtype=draw(st.sampled_from([np.float32, np.float16])),
        dead_slots=draw(st.sampled_from([0.0, 1000.0])),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_equals_the_reference(case: Case, seed: int) -> None:
    assume(case.call.slots >= case.attention.pattern.num_sink_tokens)
    feeds = inputs(case, seed)
    output, new_key, _ = run(case, feeds)
    assert_close(output, expected(case, feeds))
    shape = case.attention.shape
    keys = feeds["key"].reshape(1, case.call.rows, shape.kv_num_heads, shape.head_size)
    np.testing.assert_array_equal(new_key, keys.transpose(0, 2, 1, 3))


PLAIN = Case(
    StaticCall(rows=96, slots=160, banded_block=32, dense_block=32),
    Attention(AttentionShape(4, 2, 16, 24), TrianglePattern(8, 40, 16)),
    start=64,
    banded=True,
)


@pytest.mark.parametrize("opset", range(13, 19))
@pytest.mark.parametrize("banded", [True, False])
def test_every_opset_that_a_source_may_have(opset: int, banded: bool) -> None:
    case = dataclasses.replace(PLAIN, banded=banded)
    feeds = inputs(case, 0)
    assert_close(run(case, feeds, opset)[0], expected(case, feeds))


@pytest.mark.parametrize("banded", [True, False])
def test_large_scores_do_not_overflow_float16(banded: bool) -> None:
    """Scaled scores up to about 60000, whose unscaled products pass float16's 65504."""
    case = dataclasses.replace(PLAIN, banded=banded, dtype=np.float16)
    feeds = inputs(case, 1)
    for name in ("query", "key", "past_key"):
        feeds[name] = (feeds[name] * np.float16(60)).clip(-200, 200)
    shape = case.attention.shape
    rows = feeds["query"].reshape(-1, shape.head_size).astype(np.float64)
    keys = feeds["key"].reshape(-1, shape.head_size).astype(np.float64)
    products = rows @ keys.T
    assert np.abs(products).max() > 65504 > np.abs(products).max() * shape.head_size**-0.5
    output = _strict_float16(case, feeds)
    assert np.isfinite(output).all()
    want = expected(case, feeds)
    # Scores near 20000 are 16 apart in float16: a row may pick a neighbour of its best key.
    agree = np.abs(output - want).max(axis=-1) <= 2e-3 * np.abs(want).max()
    assert agree.mean() > 0.9


def _strict_float16(case: Case, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """By onnx's own evaluator: ONNX Runtime's CPU computes float16 products in float32."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(over="raise", invalid="raise"):
        return ReferenceEvaluator(ir.to_proto(build(case))).run(None, feeds)[0]


def test_memory_does_not_depend_on_the_cache_and_no_tensor_is_square_in_it() -> None:
    sizes = {}
    for slots in (1024, 4096):
        call = dataclasses.replace(PLAIN.call, slots=slots)
        for banded in (True, False):
            proto = ir.to_proto(build(dataclasses.replace(PLAIN, call=call, banded=banded)))
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
            shapes = [_dims(value) for value in inferred.graph.value_info]
            assert len(shapes) >= len(proto.graph.node) - 3
            assert all(sum(dim >= slots for dim in shape) <= 1 for shape in shapes)
            sizes[banded, slots] = max(int(np.prod(shape)) for shape in shapes)
    assert sizes[True, 1024] == sizes[True, 4096]
    assert sizes[False, 4096] < 4.1 * sizes[False, 1024]


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    dims = value.type.tensor_type.shape.dim
    assert all(dim.HasField("dim_value") for dim in dims), value.name
    return [dim.dim_value for dim in dims]


def test_refuses_blocks_that_do_not_divide_the_rows() -> None:
    with pytest.raises(ConfigurationError, match="banded_block is 7, but must divide the 96 rows"):
        StaticCall(96, 160, 7, 32)


def test_refuses_a_dense_pattern_in_banded_form() -> None:
    dense = Attention(PLAIN.attention.shape, TrianglePattern(0, -1, 1))
    with pytest.raises(ConfigurationError, match="pattern is dense"):
        build(dataclasses.replace(PLAIN, attention=dense))
