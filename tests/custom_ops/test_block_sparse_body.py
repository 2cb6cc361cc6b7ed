"""The block-sparse operator's function body on ONNX Runtime, beside the reference."""

from __future__ import annotations

from typing import Final

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from trianglemix.custom_ops.block_sparse.contract import OUTPUTS, BlockRule
from trianglemix.custom_ops.block_sparse.reference import (
    BlockSparse,
    block_sparse_attention,
)
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.custom_ops.triangle.reference import Attention

from tests.custom_ops.block_sparse_cases import assert_same_blocks
from tests.custom_ops.cases import Case
from tests.custom_ops.operator_session import COPIED, Backend, run_call
from tests.custom_ops.tolerances import assert_close

SHAPES: Final = (AttentionShape(2, 1, 16, 8), AttentionShape(4, 2, 8, 8))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, BlockSparse]:
    """One or two rows: a prompt or a later chunk of it, padded, in a cache with room to spare."""
    rows = draw(st.integers(1, 2))
    length = draw(st.sampled_from((1, 100, 256, 300, 520)))
    before = draw(st.lists(st.sampled_from((0, 128, 256, 333)), min_size=rows, max_size=rows))
    ends = tuple(length + past for past in before)
    more = draw(st.lists(st.sampled_from((0, 5, 300)), min_size=rows, max_size=rows))
    pads = draw(st.lists(st.sampled_from((0, 1, 77)), min_size=rows, max_size=rows))
    shape = draw(st.sampled_from(SHAPES))
    case = Case(
        attention=Attention(shape, DENSE_PATTERN),
        dtype="float32",
        batch=rows,
        length=length,
        ends=ends,
        past_capacity=max(before) + draw(st.sampled_from((0, 40))),
        prompt_lengths=tuple(end + x for end, x in zip(ends, more, strict=True)),
        first_valid=tuple(min(pad, end - 1) for pad, end in zip(pads, ends, strict=True)),
        binding=COPIED,
        seed=draw(st.integers(0, 99)),
    )
    rule = BlockRule(
        mass=draw(st.sampled_from((0.3, 0.7, 0.95, 1.0))),
        min_length=draw(st.sampled_from((0, 400))),
        num_sink_tokens=draw(st.sampled_from((0, 8, 130))),
        sliding_window_size=draw(st.sampled_from((-1, 1, 128, 300))),
        num_last_tokens=draw(st.sampled_from((1, 60, 200))),
    )
    return case, BlockSparse(shape, rule, scale=1.5, softcap=draw(st.sampled_from((0.0, 6.0))))


def run_body(call: Call, attention: BlockSparse) -> dict[str, NDArray[np.float32]]:
    """The outputs by name, of a model that holds one node and the function."""
    outputs = run_call(call, attention, "float32", Backend(None))
    return dict(zip(OUTPUTS, outputs, strict=True))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_body_is_the_reference(drawn: tuple[Case, BlockSparse]) -> None:
    case, attention = drawn
    got = run_body(case.call, attention)
    blocks = got["block_mask"].astype(bool)
    assert_same_blocks(case.call, attention, got["block_mask"], "float32")
    want = block_sparse_attention(case.call, attention, blocks)
    assert_close(got["output"], want[0], "float32")
    np.testing.assert_array_equal(got["present_key"], want[1])
    np.testing.assert_array_equal(got["present_value"], want[2])
