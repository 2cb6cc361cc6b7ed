"""Every input and output of a graph gets the role, the type and the shape that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from trianglemix.exporter.cli import command
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.roles import find_roles
from trianglemix.exporter.inspection import inspect_model
from trianglemix.exporter.interface.graph_interface import read_interface
from trianglemix.exporter.interface.runtime_fit import why_not_run
from trianglemix.manifest.interface import GraphInput, GraphOutput
from trianglemix.manifest.manifest import Manifest, ManifestError

from tests.end_to_end import odd_interfaces as odd
from tests.end_to_end.odd_interfaces import Interface
from tests.exporter.exports import export_to
from tests.odd.odd_model import HIDDEN, VOCABULARY


def inputs_of(interface: Interface, folder: Path) -> dict[str, GraphInput]:
    path = interface.write(folder / "model.onnx")
    return {value.name: value for value in inspect_model(path).interface.inputs}


def test_the_roles_of_a_plain_decoder(tmp_path: Path) -> None:
    path = Interface({}).write(tmp_path / "model.onnx")
    interface = inspect_model(path).interface
    ids, mask, positions, key, value = interface.inputs[:5]
    assert [x.role for x in interface.inputs] == [
        "input_ids", "attention_mask", "position_ids", *("past_key", "past_value") * 2,
    ]  # fmt: skip
    assert (ids.dtype, ids.shape) == ("int64", ("batch", "length"))
    assert (mask.batch_axis, mask.token_axis) == (0, 1)
    assert (positions.batch_axis, positions.token_axis) == (0, 1)
    assert key == GraphInput(
        "past_key_values.0.key", "past_key", "float32", ("batch", 2, "past", 16),
        layer=0, token_axis=2, carried_from="present.0.key",
    )  # fmt: skip
    assert (value.role, value.carried_from) == ("past_value", "present.0.value")
    assert interface.outputs[0] == GraphOutput(
        "logits", "logits", "float32", ("batch", "length", VOCABULARY)
    )
    assert [(x.role, x.layer) for x in interface.outputs[1:3]] == [
        ("present_key", 0), ("present_value", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "name", "wanted"),
    [
        ({"ids_dtype": "int32"}, "input_ids", {"dtype": "int32"}),
        ({"mask_dtype": "bool"}, "attention_mask", {"dtype": "bool"}),
        ({"positions": "rank1"}, "position_ids", {"batch_axis": None, "token_axis": 0}),
        ({"positions": "rank3"}, "position_ids", {"batch_axis": 1, "token_axis": 2}),
        ({"cache": "BTHD"}, "past_key_values.1.key", {"token_axis": 1, "layer": 1}),
        ({"cache_dtype": "float16"}, "past_key_values.1.value", {"dtype": "float16"}),
        ({"extra": "token_types"}, "token_type_ids", {"role": "token_type_ids"}),
        ({"extra": "cache_position"}, "cache_position", {"role": "cache_position"}),
        ({"extra": "temperature"}, "temperature", {"role": "unknown"}),
        ({"extra": "keep_logits"}, "num_logits_to_keep", {"role": "num_logits_to_keep"}),
        (
            {"extra": "convolution"},
            "past_conv.0",
            {"role": "state", "carried_from": "present_conv.0", "token_axis": None},
        ),
    ],
)
def test_odd_inputs(
    choices: dict[str, Any], name: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    found = inputs_of(Interface(choices), tmp_path)[name]
    assert {key: getattr(found, key) for key in wanted} == wanted


def test_outputs_that_are_not_the_next_input_as_they_are(tmp_path: Path) -> None:
    new = inputs_of(Interface({}, odd.presents_of_new_tokens), tmp_path)["past_key_values.0.key"]
    assert (new.appends, new.permutation) == (True, None)
    turned = inputs_of(Interface({}, odd.presents_transposed), tmp_path)["past_key_values.0.key"]
    assert (turned.appends, turned.permutation) == (False, (0, 2, 1, 3))


def test_a_state_is_told_by_what_is_made_of_it(tmp_path: Path) -> None:
    interface = Interface({"extra": "convolution"}, odd.states_of_other_names)
    state = inputs_of(interface, tmp_path)["a"]
    assert (state.role, state.carried_from) == ("state", "b")


def test_a_default_is_left_to_the_graph(tmp_path: Path) -> None:
    gain = inputs_of(Interface({}, odd.an_input_with_a_default), tmp_path)["gain"]
    assert gain.role == "optional"


@pytest.mark.parametrize("other", ["encoder_position_ids", "position_ids_of_images"])
def test_positions_beside_position_ids_are_not_the_texts(other: str, tmp_path: Path) -> None:
    """Fed with the text's positions they would be wrong without a word."""

    def beside(proto: onnx.ModelProto) -> None:
        _another_input(proto, other, ["batch", "patches"])

    assert inputs_of(Interface({}, beside), tmp_path)[other].role == "unknown"


def test_positions_by_a_longer_name_alone_are_the_texts(tmp_path: Path) -> None:
    def renamed(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = "decoder_position_ids" if name == "position_ids" else name
        next(x for x in proto.graph.input if x.name == "position_ids").name = "decoder_position_ids"

    found = inputs_of(Interface({}, renamed), tmp_path)["decoder_position_ids"]
    assert found.role == "position_ids"


@pytest.mark.parametrize(("length", "role"), [(7, "optional"), ("length", "token_type_ids")])
def test_a_default_of_fixed_shape_is_no_token_input(
    length: int | str, role: str, tmp_path: Path
) -> None:
    """Token types of seven tokens would fix every call at seven; their default fits all."""

    def default(proto: onnx.ModelProto) -> None:
        _another_input(proto, "token_type_ids", ["batch" if length == "length" else 1, length])
        size = (1, 7) if length == 7 else (1, 1)
        proto.graph.initializer.append(
            numpy_helper.from_array(np.zeros(size, np.int64), "token_type_ids")
        )

    assert inputs_of(Interface({}, default), tmp_path)["token_type_ids"].role == role


def _another_input(proto: onnx.ModelProto, name: str, shape: list[int | str]) -> None:
    """An integer input whose largest number is added, times 0, to the embeddings."""
    proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    embedding = next(node for node in proto.graph.node if node.op_type == "Gather")
    out, inner = embedding.output[0], "embedded/plain"
    embedding.output[0] = inner
    nodes = [
        helper.make_node("ReduceMax", [name], [f"{name}/max"], keepdims=0),
        helper.make_node("Cast", [f"{name}/max"], [f"{name}/float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}/float", f"{name}/float"], [f"{name}/zero"]),
        helper.make_node("Add", [inner, f"{name}/zero"], [out]),
    ]
    at = list(proto.graph.node).index(embedding) + 1
    for node in reversed(nodes):
        proto.graph.node.insert(at, node)


def _with_output(name: str, width: int, *, first: bool = True, rename: str | None = None) -> Any:
    """A second output `[B, S, width]` from the head's input, and the logits under another name."""

    def change(proto: onnx.ModelProto) -> None:
        head = next(node for node in proto.graph.node if node.output[0] == "logits")
        weight = helper.make_tensor(
            f"{name}.weight", TensorProto.FLOAT, [48, width], [0.1] * 48 * width
        )
        proto.graph.initializer.append(weight)
        proto.graph.node.append(helper.make_node("MatMul", [head.input[0], weight.name], [name]))
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width])
        outputs = [made, *proto.graph.output] if first else [*proto.graph.output, made]
        del proto.graph.output[:]
        proto.graph.output.extend(outputs)
        if rename is not None:
            head.output[0] = rename
            for value in proto.graph.output:
                value.name = rename if value.name == "logits" else value.name

    return change


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (_with_output("router_logits", 3), "logits"),
        (_with_output("lm_logits", VOCABULARY), "logits"),  # the exact name wins
        (_with_output("router_logits", 3, rename="lm_logits"), "lm_logits"),
        (_with_output("router_logits", 3, rename="output"), "output"),
        (_with_output("mtp_logits", VOCABULARY, rename="lm_logits"), "lm_logits"),
        (_with_output("last_hidden_state", HIDDEN, rename="scores"), "scores"),
        (_with_output("features", 7, rename="output"), "output"),  # by the vocabulary
    ],
)
def test_the_logits_are_told_from_other_outputs(change: Any, wanted: str, tmp_path: Path) -> None:
    path = Interface({}, change).write(tmp_path / "model.onnx")
    outputs = inspect_model(path).interface.outputs
    assert [x.name for x in outputs if x.role == "logits"] == [wanted]


def test_two_outputs_that_may_be_the_logits_are_refused(tmp_path: Path) -> None:
    change = _with_output("output_0", VOCABULARY, rename="output_1")
    path = Interface({}, change).write(tmp_path / "model.onnx")
    with pytest.raises(RefusedError, match="output_0 and output_1 may each be the logits"):
        inspect_model(path)


@pytest.mark.parametrize(
    ("choices", "wanted"),
    [
        ({}, True),
        ({"positions": "rank3"}, True),
        ({"positions": "rank1"}, False),
        ({"positions": "slots"}, False),
        ({"extra": "convolution"}, False),
        ({"spelling": "group_query", "repeat": "inside"}, False),
    ],
)
def test_left_padding_where_every_row_knows_its_positions(
    choices: dict[str, Any], wanted: bool, tmp_path: Path
) -> None:
    export_to(Interface(choices).write(tmp_path / "model.onnx"), tmp_path / "out", layers=(1,))
    assert Manifest.load(tmp_path / "out").left_padding is wanted


def test_the_manifest_brings_the_table_back(tmp_path: Path) -> None:
    interface = Interface({"extra": "convolution", "batch": 1}, odd.presents_transposed)
    export_to(interface.write(tmp_path / "model.onnx"), tmp_path / "out", layers=(1,))
    manifest = Manifest.load(tmp_path / "out")
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.batch == 1
    names = [value.name for value in onnx.load(tmp_path / "out" / "model.onnx").graph.input]
    assert [value.name for value in manifest.inputs] == names
    assert manifest.inputs[-1].role == "prompt_length"


def test_a_manifest_of_the_first_format_is_to_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(ManifestError, match="export the model again"):
        Manifest.load(tmp_path)


def test_inspect_prints_the_table(tmp_path: Path) -> None:
    path = Interface({"extra": "temperature", "batch": 1}).write(tmp_path / "model.onnx")
    runner = CliRunner(env={"COLUMNS": "200"})
    result = runner.invoke(command, [str(path), "--inspect"])
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[2].strip(): line for line in result.output.splitlines() if "│" in line}
    assert "[1, length]" in rows["input_ids"]
    assert "past key" in rows["past_key_values.0.key and 1 more"]
    assert "its user" in rows["temperature"]
    assert "logits" in rows["logits"]
    reason = "trianglemix-run could not run the export: nothing says what its input temperature"
    assert reason in result.output
    quiet = runner.invoke(command, [str(path), "--inspect", "--quiet"])
    lines = quiet.output.splitlines()
    assert lines[0] == f"{path}: 2 attentions (softmax)"
    assert lines[1] == "can be exported"
    assert lines[2].startswith(reason)


def _two_states(names: tuple[str, str, str, str], *, coupled: bool) -> onnx.ModelProto:
    """Token ids, through one state and then another, to logits; outputs in the wrong order.

    `coupled`: each of the outputs is made of both states.
    """
    first, second, after_first, after_second = names
    info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Add", [second if coupled else "mean", "mean"], ["met"]),
        helper.make_node("Add", ["met", first], [after_first]),
        helper.make_node("Mul", [after_first, second], [after_second]),
        helper.make_node("Unsqueeze", [after_second, "one"], ["y"]),
        helper.make_node("Add", ["x", "y"], ["logits"]),
        helper.make_node("Shape", ["attention_mask"], ["unused"]),
    ]
    graph = helper.make_graph(
        nodes,
        "states",
        [
            info("input_ids", TensorProto.INT64, ["B", "S"]),
            info("attention_mask", TensorProto.INT64, ["B", "T"]),
            info(first, floats, ["B", 7]),
            info(second, floats, ["B", 7]),
        ],
        [
            info("logits", floats, ["B", "S", 7]),
            info(after_second, floats, ["B", 7]),
            info(after_first, floats, ["B", 7]),
        ],
        [
            numpy_helper.from_array(np.ones((7, 7), np.float32), "table"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("names", "coupled"),
    [
        (("a", "b", "c", "d"), False),  # by the order in which one is made of another
        (("past_ssm", "past_conv", "present_ssm", "present_conv"), True),  # by name
        (("state.0.in", "state.1.in", "state.0.out", "state.1.out"), True),
    ],
)
def test_each_state_finds_its_own_output(names: tuple[str, str, str, str], coupled: bool) -> None:
    graph = ir.from_proto(_two_states(names, coupled=coupled)).graph
    found = read_interface(graph, find_roles(graph), ())
    carried = {value.name: value.carried_from for value in found.inputs if value.is_carried}
    assert carried == {names[0]: names[2], names[1]: names[3]}


def test_states_that_cannot_be_told_apart_are_carried_by_nobody() -> None:
    graph = ir.from_proto(_two_states(("a", "b", "c", "d"), coupled=True)).graph
    found = read_interface(graph, find_roles(graph), ())
    assert [value.role for value in found.inputs[2:]] == ["unknown", "unknown"]
    assert "input a [B,7] float32" in str(why_not_run(found))
