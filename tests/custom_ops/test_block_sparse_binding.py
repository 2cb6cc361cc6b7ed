"""The border of the block-sparse operator: its own attributes and output, its name in refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import ATTRIBUTES, OP_TYPE, BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.library import library_path
from trianglemix.custom_ops.reference import Call

from tests.custom_ops.block_sparse_cases import prompt
from tests.custom_ops.operator_session import (
    ALL_INPUTS,
    BLOCK_MASK,
    Backend,
    attributes_of,
    build_model,
    feeds_of,
    open_session,
)

Array = NDArray[Any]
BACKEND = Backend(library_path())
SHAPE = AttentionShape(4, 2, 16, 24)
GIVEN = BlockSparse(SHAPE, BlockRule(mass=0.5, min_length=0), scale=1.0)
HEADS = {contract.ATTR_NUM_HEADS: 4, contract.ATTR_KV_NUM_HEADS: 2}


def run(
    call: Call, attributes: dict[str, Any], more: dict[str, Array] | None = None
) -> list[Array]:
    """What the node answers, the mask last; the past is left out."""
    feeds = {k: v for k, v in feeds_of(call).items() if not k.startswith("past")} | (more or {})
    ranks = {name: array.ndim for name, array in feeds.items()}
    absent = frozenset(ALL_INPUTS) - feeds.keys()
    model = build_model(attributes, "float32", absent, ranks, OP_TYPE)
    outputs: list[Array] = open_session(model, BACKEND).run(None, feeds)
    return outputs


BAD_ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"mass": 0.0}, r"mass is 0.000000, but must be in \(0, 1\]"),
    ({"mass": -0.5}, "mass is -0.500000"),
    ({"mass": 1.25}, "mass is 1.250000"),
    ({"mass": float("nan")}, "mass is "),
    ({"mass": 1}, "mass is an attribute of another type, but must be a float"),
    ({"min_length": -1}, "min_length is -1, but must be 0 or more"),
    ({"min_length": 4.0}, "min_length is an attribute of another type, but must be an integer"),
    ({"num_sink_tokens": -1}, "num_sink_tokens is -1"),
    ({"sliding_window_size": 0}, "sliding_window_size is 0"),
    ({"num_last_tokens": 0}, "num_last_tokens is 0"),
    ({"num_heads": 3}, "num_heads is 3 and kv_num_heads is 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ATTRIBUTES, ids=str)
def test_impossible_attributes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ort_errors.RuntimeException, match=f"{OP_TYPE}: .*{message}"):
        run(prompt(300, SHAPE), {**attributes_of(GIVEN), **changes})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_names_are_those_of_the_contract(name: str) -> None:
    with pytest.raises(ort_errors.RuntimeException, match=f"{OP_TYPE}: {name} is"):
        run(prompt(300, SHAPE), {**attributes_of(GIVEN), name: "a text"})


def test_attribute_defaults_are_those_of_the_contract() -> None:
    call = prompt(BlockRule().min_length + 700, SHAPE)
    default = BlockSparse(SHAPE)
    output, *_, mask = run(call, HEADS)
    assert (mask == run(call, attributes_of(default))[-1]).all()
    assert (output == run(call, attributes_of(default))[0]).all()
    others = [
        BlockRule(mass=0.9),
        BlockRule(min_length=5000),
        BlockRule(num_sink_tokens=2000),
        BlockRule(sliding_window_size=1000),
        BlockRule(num_last_tokens=256),
    ]
    for rule in others:
        changed = run(call, attributes_of(replace(default, rule=rule)))[-1]
        assert (changed != mask).any(), f"{rule} has no effect"


@pytest.mark.parametrize("huge", [2**31, 2**40, 2**63 - 1])
def test_bounds_beyond_all_positions_do_not_overflow(huge: int) -> None:
    call, causal = prompt(700, SHAPE), np.tri(6, dtype=bool)
    for name in ("min_length", "num_sink_tokens", "sliding_window_size", "num_last_tokens"):
        rule = replace(GIVEN.rule, **{name: huge})
        *_, mask = run(call, attributes_of(replace(GIVEN, rule=rule)))
        assert (mask.astype(bool) == causal).all(), name


def test_impossible_inputs_are_refused_in_its_name() -> None:
    bad = {
        "query": (np.zeros((1, 300, 66), np.float32), "query has shape .* its 4 heads"),
        "seqlens_k": (np.array([300], np.int32), r"seqlens_k\[0\] is 300"),
        "prompt_length": (np.array([-1], np.int32), r"prompt_length\[0\] is -1"),
        "total_sequence_length": (np.array(301, np.int32), "total_sequence_length is 301"),
    }
    for name, (array, message) in bad.items():
        with pytest.raises(ort_errors.InvalidArgument, match=f"{OP_TYPE}: {message}"):
            run(prompt(300, SHAPE), attributes_of(GIVEN), {name: array})


@pytest.mark.parametrize("asked", [False, True])
def test_the_shape_of_the_first_output_is_known_before_the_call(asked: bool) -> None:
    absent = frozenset(contract.ROTARY_INPUTS) | (frozenset() if asked else {BLOCK_MASK})
    model = build_model(attributes_of(GIVEN), "float32", absent, op_type=OP_TYPE)
    model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = 2 * 24
    outputs = open_session(model, BACKEND).get_outputs()
    assert len(outputs) == 3 + asked
    assert outputs[0].shape == ["query_0", "query_1", 4 * 24]


def test_a_mask_without_a_name_is_an_absent_one() -> None:
    feeds = {k: v for k, v in feeds_of(prompt(700, SHAPE)).items() if not k.startswith("past")}
    absent = (frozenset(ALL_INPUTS) - feeds.keys()) | {BLOCK_MASK}
    model = build_model(attributes_of(GIVEN), "float32", absent, op_type=OP_TYPE)
    model.graph.node[0].output.append("")
    outputs = open_session(model, BACKEND).run(None, feeds)
    assert len(outputs) == 3
    assert (outputs[0] == run(prompt(700, SHAPE), attributes_of(GIVEN))[0]).all()


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_compute_is_no_error(batch: int, length: int) -> None:
    past = np.ones((batch, 2, 8, 16), np.float32)
    more = {
        "query": np.zeros((batch, length, 4 * 16), np.float32),
        "key": np.zeros((batch, length, 2 * 16), np.float32),
        "value": np.zeros((batch, length, 2 * 16), np.float32),
        "past_key": past,
        "past_value": past,
        "seqlens_k": np.full(batch, 7, np.int32),
        "total_sequence_length": np.array(8, np.int32),
        "first_valid": np.zeros(batch, np.int32),
    }
    output, present_key, _, mask = run(prompt(8, SHAPE), attributes_of(GIVEN), more)
    assert output.shape == (batch, length, 4 * 16)
    assert (present_key == past).all()
    assert mask.shape == (batch, 4, 1, 1)
