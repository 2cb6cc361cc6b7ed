"""docs/operator.md says what the contract says, and its program runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import ATTRIBUTES as BLOCK_SPARSE_ATTRIBUTES
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE as BLOCK_SPARSE
from trianglemix.custom_ops.block_sparse.contract import OUTPUTS as BLOCK_SPARSE_OUTPUTS
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.reference import Call
from trianglemix.custom_ops.triangle.contract import ATTRIBUTES, TrianglePattern
from trianglemix.custom_ops.triangle.function_body import build_function
from trianglemix.custom_ops.triangle.reference import Attention, triangle_attention

PAGE = Path(__file__).resolve().parents[2] / "docs/operator.md"


def _section(title: str) -> str:
    (text,) = re.findall(
        rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    return str(text)


def _rows(title: str) -> list[list[str]]:
    """The cells of the section's table, without its head."""
    lines = [line for line in _section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_inputs_are_those_of_the_contract() -> None:
    listed = [(int(row[0]), row[1].strip("`")) for row in _rows("Inputs")]
    assert listed == list(enumerate((*contract.INPUTS, *contract.ROTARY_INPUTS)))


def test_outputs_are_those_of_the_contract() -> None:
    listed = [(int(row[0]), row[1].strip("`")) for row in _rows("Outputs")]
    assert listed == list(enumerate(contract.OUTPUTS))


def test_attributes_and_their_defaults_are_those_of_the_contract() -> None:
    listed = {row[0].strip("`"): row[2] for row in _rows("Attributes")}
    assert tuple(listed) == (*ATTRIBUTES, contract.ATTR_INTERLEAVED)
    defaults = {name: int(default) for name, default in listed.items() if default != "-"}
    others = {contract.ATTR_SCALE: 0, contract.ATTR_SOFTCAP: 0, contract.ATTR_INTERLEAVED: 0}
    assert defaults == {**TrianglePattern().as_attributes(), **others}


def test_the_block_sparse_operators_own_part_is_that_of_its_contract() -> None:
    listed = {row[0].strip("`"): float(row[2]) for row in _rows(BLOCK_SPARSE)}
    assert listed == BlockRule().as_attributes()
    assert set(BLOCK_SPARSE_ATTRIBUTES) == {*contract.ATTRIBUTES, *listed}
    (mask,) = BLOCK_SPARSE_OUTPUTS[len(contract.OUTPUTS) :]
    assert f"Output {len(contract.OUTPUTS)}, `{mask}`" in _section(BLOCK_SPARSE)


def test_the_function_body_is_what_the_page_says() -> None:
    function = build_function()
    assert [x.name for x in function.inputs] == [row[1].strip("`") for row in _rows("Inputs")[:9]]
    assert list(function.attributes) == [row[0].strip("`") for row in _rows("Attributes")[:7]]
    assert f"opset {function.opset_imports['']}" in _section("Without the library")


def test_the_program_gives_the_references_numbers() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(program.replace("S = 8, 2, 64, 2000", "S = 8, 2, 64, 700"), names)
    feeds, heads = names["inputs"], AttentionShape(names["H"], names["G"], names["D"], names["D"])
    past = np.zeros((1, names["G"], 0, names["D"]), np.float32)
    length = feeds["query"].shape[1]
    assert length == 700 > (TrianglePattern().exact_length or 0)
    call = Call(
        *(feeds[name] for name in contract.INPUTS[:3]), past, past, feeds["seqlens_k"], length
    )
    expected = triangle_attention(call, Attention(heads, TrianglePattern()))
    for name, wanted in zip(contract.OUTPUTS, expected, strict=True):
        np.testing.assert_allclose(names[name], wanted, rtol=0, atol=1e-5, err_msg=name)
