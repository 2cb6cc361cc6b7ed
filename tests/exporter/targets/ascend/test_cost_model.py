"""The cost model counts what the graphs compute, and knows which tiles fit."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep_mask
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.targets.ascend.block_form import StaticCall
from trianglemix.exporter.targets.ascend.cost_model import (
    BLOCK_SIZES,
    CostModel,
    choose_block,
    choose_dense_block,
    tile_fit,
)
from trianglemix.exporter.targets.ascend.prediction import predict, print_prediction
from trianglemix.exporter.targets.ascend.soc import SOCS, find_soc

from tests.custom_ops.block_form_case import Case, build

SHAPE = AttentionShape(32, 8, 128, 128)
TRIANGLE = Attention(SHAPE, TrianglePattern(8, 512, 128))
DENSE = Attention(SHAPE, DENSE_PATTERN)
MODEL = CostModel([DENSE] * 16 + [TRIANGLE] * 16, 2, 7_000_000_000, 8192, 1024)
B3 = find_soc("Ascend910B3")


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_flops_are_those_of_the_graphs_products(block: int) -> None:
    shape = AttentionShape(4, 2, 16, 24)
    attention = Attention(shape, TrianglePattern(8, 100, 16))
    case = Case(StaticCall(256, 512, block, 256), attention, start=0, banded=True)
    model = CostModel([attention], 4, 0, 512, 256)
    assert model.banded(attention, block, 256, B3).flops == _product_flops(ir.to_proto(build(case)))


def _product_flops(model: onnx.ModelProto) -> float:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    return float(
        sum(
            2 * np.prod(dims[node.output[0]]) * dims[node.input[0]][-1]
            for node in inferred.node
            if node.op_type == "MatMul"
        )
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 20), st.integers(1, 80), st.integers(1, 30))
def test_kept_pairs_of_streaming_rows(rows: int, sink: int, window: int, last: int) -> None:
    pattern = TrianglePattern(sink, window, last)
    attention = dataclasses.replace(TRIANGLE, pattern=pattern)
    work = dataclasses.replace(MODEL, layers=[attention]).banded(attention, 16, rows, B3)
    pairs = keep_mask(rows + last, pattern)[:rows].sum()
    assert work.kept_flops == 2 * pairs * 32 * 256


@pytest.mark.parametrize("soc", SOCS, ids=lambda soc: soc.name)
def test_a_triangle_layer_costs_less_than_a_dense_one(soc: object) -> None:
    for length in (2900, 8000):
        cost = MODEL.prompt(length, 128, soc)  # type: ignore[arg-type]
        assert cost.banded is not None
        assert cost.banded.flops < cost.dense.flops
        assert cost.attention_seconds < cost.dense_attention_seconds
        assert 0 < cost.attention_share < 1
        assert cost.prefill_share < 1


def test_the_chosen_block_is_the_fastest_and_divides_the_chunk() -> None:
    chosen = choose_block(MODEL, 8000, B3)
    times = {b: MODEL.prompt(8000, b, B3).attention_seconds for b in BLOCK_SIZES}
    assert times[chosen] == min(times.values())
    odd = dataclasses.replace(MODEL, chunk=96)
    assert 96 % choose_block(odd, 8000, B3) == 0
    assert choose_block(dataclasses.replace(MODEL, chunk=7), 8000, B3) == 7


def test_dense_row_blocks_shrink_as_the_cache_grows() -> None:
    blocks = [choose_dense_block(dataclasses.replace(MODEL, slots=s)) for s in (1024, 8192, 131072)]
    assert blocks == sorted(blocks, reverse=True)
    assert blocks[0] > blocks[-1]


def test_tiles_that_are_known_to_fit() -> None:
    """As a fused kernel's compiler plans them: head size 128, two bytes a number."""
    for name in ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9599"):
        assert tile_fit(TRIANGLE, (64, 128), 2, find_soc(name)).fits
    for name in ("Ascend910B3", "Ascend910_9391"):
        assert not tile_fit(TRIANGLE, (128, 128), 2, find_soc(name)).fits


def test_the_printed_table_says_that_nothing_was_measured() -> None:
    text = io.StringIO()
    prediction = predict(MODEL, 8000, B3, 128)
    print_prediction(prediction, Console(file=text, width=120))
    assert "128 *" in text.getvalue()
    assert "nothing was measured" in text.getvalue()
    assert {chip.soc for chip in prediction.chips} == {soc.name for soc in SOCS}
