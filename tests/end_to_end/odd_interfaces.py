"""Decoders with odd interfaces, written without the product, and their sources' logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.end_to_end.graph_edits import (
    appends,
    behind_logits,
    declare,
    embedding,
    producer,
    rename,
    scale_embeddings,
)
from tests.odd.calls import Call, make_feeds
from tests.odd.decoder import write_model
from tests.odd.odd_model import HEAD_SIZE, VOCABULARY, OddModel

Array = NDArray[Any]
Change = Callable[[onnx.ModelProto], None]

KEPT: Final = 32
OTHER_NAMES: Final = {
    "input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions",
}  # fmt: skip
PLAIN: Final = OddModel(
    seed=4, mask="causal", size=40, scale="times", window_layers=(), num_layers=2,
    spelling="softmax", repeat="expand", kv_heads=2, opset=18, dtype="float32", mask_form="where",
    cache="BHTD", cache_dtype="float32", ids_dtype="int64", mask_dtype="int64", positions="rank2",
    batch="batch", present="joined", extra="nothing", attribute="none", storage="inside",
    branches=False, shares=False, shapes=True, shuffled=False,
)  # fmt: skip


@dataclass(frozen=True)
class Interface:
    """A decoder: the plain one with other choices, its file then changed by hand.

    `feeds` are what its source is given beside the usual.
    """

    choices: dict[str, Any]
    change: Change | None = None
    feeds: Callable[[int], dict[str, Array]] = lambda length: {}

    @property
    def model(self) -> OddModel:
        return replace(PLAIN, **self.choices)

    def write(self, path: Path) -> Path:
        """Saves the source."""
        proto = write_model(self.model)
        if self.change is not None:
            self.change(proto)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(proto, path)
        return path

    def logits(self, path: Path, text: list[int]) -> Array:
        """The source's logits `[vocabulary]` after a text, read whole over an empty cache."""
        session = _open(path)
        names = {value.name for value in session.get_inputs()}
        feeds = make_feeds(self.model, Call(len(text)), 0)
        feeds["input_ids"] = np.array([text]).astype(self.model.ids_dtype)
        feeds |= self.feeds(len(text))
        feeds |= {new: feeds[old] for old, new in OTHER_NAMES.items() if old in feeds}
        feeds |= {"m": feeds["position_ids"]} if "position_ids" in feeds else {}
        used = {name: array for name, array in feeds.items() if name in names}
        (name,) = [x.name for x in session.get_outputs() if x.name in ("logits", "scores")]
        (logits,) = session.run([name], used)
        return np.asarray(logits).reshape(-1, VOCABULARY)[-1]


@cache
def _open(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def presents_of_new_tokens(proto: onnx.ModelProto) -> None:
    """Each present shows the call's new keys or values alone."""
    for node in appends(proto):
        present = node.output[0]
        rename(proto, present, f"{present}/joined")
        proto.graph.node.append(helper.make_node("Identity", [node.input[1]], [present]))
        declare(proto, present, ["batch", PLAIN.kv_heads, "length", HEAD_SIZE])


def presents_transposed(proto: onnx.ModelProto) -> None:
    """Each present has its axes in another order than its past."""
    for node in appends(proto):
        present = node.output[0]
        rename(proto, present, f"{present}/joined")
        perm = [0, 2, 1, 3]
        proto.graph.node.append(
            helper.make_node("Transpose", [f"{present}/joined"], [present], perm=perm)
        )
        declare(proto, present, ["batch", "total", PLAIN.kv_heads, HEAD_SIZE])


def presents_cut(proto: onnx.ModelProto) -> None:
    """Each present keeps the last `KEPT` tokens."""
    for name, number in (("from", -KEPT), ("to", 2**62), ("along", 2)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([number]), f"cut/{name}"))
    for node in appends(proto):
        present = node.output[0]
        rename(proto, present, f"{present}/joined")
        inputs = [f"{present}/joined", "cut/from", "cut/to", "cut/along"]
        proto.graph.node.append(helper.make_node("Slice", inputs, [present]))


def one_token_a_call(proto: onnx.ModelProto) -> None:
    """The number of new tokens is fixed at one."""
    for value in proto.graph.input:
        if value.name in ("input_ids", "position_ids"):
            value.type.tensor_type.shape.dim[-1].dim_value = 1


def all_sizes_fixed(proto: onnx.ModelProto) -> None:
    """Calls of 16 tokens over a past of 32 slots, one row."""
    sizes = {"batch": 1, "length": 16, "past": 32, "total": 48}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def states_of_other_names(proto: onnx.ModelProto) -> None:
    """Nothing in a name tells which output is which input a step later."""
    for old, new in (("past_conv.0", "a"), ("present_conv.0", "b")):
        rename(proto, old, new)
        for value in (*proto.graph.input, *proto.graph.output):
            value.name = new if value.name == old else value.name


def state_read_by_one_token(proto: onnx.ModelProto) -> None:
    """The state is added to the first column instead of standing before it."""
    node = next(node for node in proto.graph.node if "past_conv.0" in node.input)
    proto.graph.node.insert(
        list(proto.graph.node).index(node),
        helper.make_node("Identity", ["past_conv.0"], ["kept"]),
    )
    node.input[list(node.input).index("past_conv.0")] = "kept_too"
    proto.graph.node.insert(
        list(proto.graph.node).index(node),
        helper.make_node("Add", ["kept", "kept"], ["kept_too"]),
    )


def counted_logits_as_a_list(proto: onnx.ModelProto) -> None:
    """`num_logits_to_keep` as `[1]`."""
    for value in proto.graph.input:
        if value.name == "num_logits_to_keep":
            value.type.tensor_type.shape.dim.add().dim_value = 1
    for node in list(proto.graph.node):
        if node.op_type == "Unsqueeze" and producer(proto, node.input[0]) == "Neg":
            node.op_type = "Identity"
            del node.input[1:]


def an_input_with_a_default(proto: onnx.ModelProto) -> None:
    """`gain` scales the embeddings; its default stands among the initializers."""
    scale_embeddings(proto, "gain")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.5), "gain"))


def an_input_that_nobody_knows(proto: onnx.ModelProto) -> None:
    """`gain` without a default."""
    scale_embeddings(proto, "gain")


def lengths_as_inputs(proto: onnx.ModelProto) -> None:
    """The embeddings times `1 + (seqlens_k + 1 - total) + 2 (total - past - S)`: times 1."""
    for name, shape in (("total_sequence_length", []), ("past_sequence_length", [1]),
                        ("seqlens_k", ["batch"])):  # fmt: skip
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
    first = embedding(proto)
    out, inner = first.output[0], "embedded"
    first.output[0] = inner
    factor = [
        helper.make_node("Shape", ["input_ids"], ["length/0"], start=1, end=2),
        helper.make_node("Cast", ["length/0"], ["length/1"], to=TensorProto.INT32),
        helper.make_node("Add", ["past_sequence_length", "length/1"], ["end/0"]),
        helper.make_node("Sub", ["total_sequence_length", "end/0"], ["apart/0"]),
        helper.make_node("Add", ["apart/0", "apart/0"], ["apart/1"]),
        helper.make_node("Sub", ["seqlens_k", "total_sequence_length"], ["last/0"]),
        helper.make_node("Add", ["last/0", "apart/1"], ["sum/0"]),
        helper.make_node("Add", ["sum/0", "two"], ["sum/1"]),
        helper.make_node("Cast", ["sum/1"], ["sum/2"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["sum/2", "axes/12"], ["sum/3"]),
        helper.make_node("Mul", [inner, "sum/3"], [out]),
    ]
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "axes/12"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(2, np.int32), "two"))
    at = list(proto.graph.node).index(first)
    for number, node in enumerate(factor):
        proto.graph.node.insert(at + 1 + number, node)


def other_names(proto: onnx.ModelProto) -> None:
    """Of tokens, mask and positions."""
    for old, new in OTHER_NAMES.items():
        rename(proto, old, new)
        next(value for value in proto.graph.input if value.name == old).name = new


def other_names_throughout(proto: onnx.ModelProto) -> None:
    """Of the logits as well."""
    other_names(proto)
    rename(proto, "logits", "scores")
    next(value for value in proto.graph.output if value.name == "logits").name = "scores"


def other_names_and_open_vocabulary(proto: onnx.ModelProto) -> None:
    """Nor does the file say how many numbers the logits have."""
    other_names_throughout(proto)
    scores = next(value for value in proto.graph.output if value.name == "scores")
    scores.type.tensor_type.shape.dim[2].dim_param = "vocabulary"


def positions_of_another_name(proto: onnx.ModelProto) -> None:
    """What turns the rotation is called after nothing."""
    rename(proto, "position_ids", "m")
    next(value for value in proto.graph.input if value.name == "position_ids").name = "m"


def token_types_of_all(proto: onnx.ModelProto) -> None:
    """As long as attention_mask; the last of them are the new tokens'."""
    for value in proto.graph.input:
        if value.name == "token_type_ids":
            value.type.tensor_type.shape.dim[1].dim_param = "total"
    rename(proto, "token_type_ids", "types/new")
    for name, number in (("from", 0), ("along", 1), ("zero", 0)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([number]), f"types/{name}"))
    before = [
        helper.make_node("Shape", ["input_ids"], ["types/length"], start=1, end=2),
        helper.make_node("Sub", ["types/zero", "types/length"], ["types/start"]),
        helper.make_node("Shape", ["token_type_ids"], ["types/end"], start=1, end=2),
        helper.make_node(
            "Slice", ["token_type_ids", "types/start", "types/end", "types/along"], ["types/new"]
        ),
    ]
    for node in reversed(before):
        proto.graph.node.insert(0, node)


def token_types_of_open_length(proto: onnx.ModelProto) -> None:
    """The same, and the file does not say how long they are."""
    token_types_of_all(proto)
    for value in proto.graph.input:
        if value.name == "token_type_ids":
            value.type.tensor_type.shape.dim[1].Clear()


def reordered_rows(proto: onnx.ModelProto) -> None:
    """`beam_idx` says which row of each past goes on as which."""
    proto.graph.input.append(
        helper.make_tensor_value_info("beam_idx", TensorProto.INT32, ["batch"])
    )
    for node in appends(proto):
        past, chosen = node.input[0], f"{node.input[0]}/chosen"
        node.input[0] = chosen
        at = list(proto.graph.node).index(node)
        proto.graph.node.insert(
            at, helper.make_node("Gather", [past, "beam_idx"], [chosen], axis=0)
        )


def start_position(proto: onnx.ModelProto) -> None:
    """Positions, and the mask's rows, are counted on from `start_pos`."""
    _counted_from(proto, "start_pos", [])


def offset_of_positions(proto: onnx.ModelProto) -> None:
    """The same by a name that tells less, as `[1]`."""
    _counted_from(proto, "offset", [1])


def _counted_from(proto: onnx.ModelProto, name: str, shape: list[int]) -> None:
    """The first number of every Range over the new tokens comes from outside."""
    proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    (rows,) = [x for x in proto.graph.node if x.op_type == "Range" and _is_made(proto, x.input[0])]
    length, start, scalar = f"{name}/length", f"{name}/new", f"{name}/scalar"
    at = list(proto.graph.node).index(rows)
    zero, one = (numpy_helper.from_array(np.array(x), f"{name}/{x}") for x in (0, 1))
    proto.graph.initializer.extend([zero, one])
    nodes = [
        helper.make_node("Shape", ["input_ids"], [f"{length}/1"], start=1, end=2),
        helper.make_node("Squeeze", [f"{length}/1"], [length]),
        helper.make_node("Range", [zero.name, length, one.name], [start]),
        helper.make_node("Squeeze" if shape else "Identity", [name], [scalar]),
        helper.make_node("Add", [start, scalar], [rows.output[0]]),
    ]
    proto.graph.node.remove(rows)
    for node in reversed(nodes):
        proto.graph.node.insert(at, node)


def _is_made(proto: onnx.ModelProto, name: str) -> bool:
    return any(name in node.output for node in proto.graph.node)


def rows_by_position(proto: onnx.ModelProto) -> None:
    """The causal mask compares slots of keys with position_ids: left pads hide a row's own key."""
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 3]), "rows/axes"))
    row = helper.make_node("Unsqueeze", ["position_ids", "rows/axes"], ["rows/positions"])
    proto.graph.node.insert(0, row)
    for node in proto.graph.node:
        if node.op_type == "GreaterOrEqual":
            node.input[0] = "rows/positions"


def a_mask_for_each_row(proto: onnx.ModelProto) -> None:
    """`attention_mask_4d` is added to all scores."""
    _add_whole_mask(proto)
    for node in [x for x in proto.graph.node if x.op_type == "Softmax"]:
        at = list(proto.graph.node).index(node)
        scores, added = node.input[0], f"{node.input[0]}/added"
        node.input[0] = added
        proto.graph.node.insert(at, helper.make_node("Add", [scores, "attention_mask_4d"], [added]))


def a_mask_for_each_row_unused(proto: onnx.ModelProto) -> None:
    """`attention_mask_4d` stands among the inputs alone."""
    _add_whole_mask(proto)


def _add_whole_mask(proto: onnx.ModelProto) -> None:
    shape = ["batch", 1, "length", "total"]
    proto.graph.input.append(
        helper.make_tensor_value_info("attention_mask_4d", TensorProto.FLOAT, shape)
    )


def transposed_logits(proto: onnx.ModelProto) -> None:
    """`[B, vocabulary, S]`."""
    behind_logits(proto, ["batch", VOCABULARY, "length"], "Transpose", perm=[0, 2, 1])


def logits_by_length(proto: onnx.ModelProto) -> None:
    """`[S, B, vocabulary]`."""
    behind_logits(proto, ["length", "batch", VOCABULARY], "Transpose", perm=[1, 0, 2])


def chosen_tokens(proto: onnx.ModelProto) -> None:
    """`[B, S]` token ids for logits."""
    behind_logits(proto, ["batch", "length"], "ArgMax", axis=-1, keepdims=0)


def logits_of_one_row(proto: onnx.ModelProto) -> None:
    """`[B, vocabulary]`."""
    proto.graph.initializer.append(numpy_helper.from_array(np.array(-1), "last"))
    behind_logits(proto, ["batch", VOCABULARY], "Gather", "last", axis=1)


def prompt(length: int, seed: int = 3) -> list[int]:
    """Random tokens."""
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
    return ids
