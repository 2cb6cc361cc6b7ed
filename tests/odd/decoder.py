"""Writes the decoder of an `OddModel`: interface, rotation, layers, head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx

from tests.odd.attention import Heads, attend, group_query
from tests.odd.graph_writer import GraphWriter
from tests.odd.masks import MASKS, Slots
from tests.odd.odd_model import HEAD_SIZE, HEADS, HIDDEN, VOCABULARY, OddModel
from tests.odd.scales import TABLE

PAST: Final = "past_key_values.{}.{}"
PRESENT: Final = "present.{}.{}"
ROUTES: Final = 3


@dataclass(frozen=True)
class Triangle:
    """A triangle pattern that one layer of a reference has in its mask."""

    layer: int
    sink: int
    window: int
    last: int


@dataclass(frozen=True)
class _Frame:
    """What every layer reads."""

    slots: Slots
    seen: dict[int, str]  # bool masks by layer
    cos: str  # [B, 1, S, D/2]
    sin: str
    lengths: tuple[str, str]  # seqlens_k [B], total [1], int32


def write_model(model: OddModel, triangle: Triangle | None = None) -> onnx.ModelProto:
    """The model as a file's content. With `triangle` one layer keeps those keys only, in its mask.

    Such a reference is spelled plainly whatever the model's own spelling.
    """
    if triangle is not None:
        plain = "softmax" if model.spelling == "group_query" else model.spelling
        repeat = "expand" if model.kv_heads != HEADS and model.spelling == "group_query" else None
        scale = "softcap" if model.attribute == "softcap" and plain == "softmax" else model.scale
        model = replace(model, spelling=plain, repeat=repeat or model.repeat, scale=scale)
    g = GraphWriter(model.seed, model.opset, model.dtype)
    ids = g.graph_input("input_ids", model.ids_dtype, model.batch, "length")
    g.graph_input("attention_mask", model.mask_dtype, model.batch, "total")
    hidden = str(g.op("Gather", g.weight("embedding", VOCABULARY, HIDDEN, gain=8), ids))
    hidden = _extra(g, model, hidden)
    frame = _frame(g, model, ids, triangle)
    first: tuple[str, str] | None = None  # keys and values with their past
    for layer in range(model.num_layers):
        shared = first if model.shares and layer == model.num_layers - 1 else None
        result, own = _attention(g, model, layer, hidden, frame, shared)
        first = first or own
        hidden = str(g.op("Add", hidden, result))
        hidden = str(g.op("Add", hidden, _mlp(g, layer, hidden)))
    _head(g, model, _norm(g, "final", hidden))
    return g.model(infer_shapes=model.shapes, shuffle=model.shuffled)


def _extra(g: GraphWriter, model: OddModel, hidden: str) -> str:
    """What stands between the embedding and the layers, with an input of its own."""
    if model.extra == "token_types":
        kinds = g.graph_input("token_type_ids", "int64", model.batch, "length")
        return str(g.op("Add", hidden, g.op("Gather", g.weight("types", 2, HIDDEN), kinds)))
    if model.extra == "cache_position":
        at = g.graph_input("cache_position", "int64", "length")
        table = g.op("Gather", g.weight("places", TABLE, HIDDEN), at)
        return str(g.op("Add", hidden, g.unsqueeze(table, 0)))
    if model.extra == "temperature":
        divisor = g.graph_input("temperature", "float32")
        return str(g.op("Div", hidden, g.cast(divisor, g.dtype)))
    if model.extra == "convolution":
        past = g.graph_input("past_conv.0", g.dtype, model.batch, HIDDEN, 2)
        g.graph_output("present_conv.0", g.dtype, model.batch, HIDDEN, 2)
        columns = g.op("Transpose", hidden, perm=[0, 2, 1])
        joined = g.op("Concat", past, columns, axis=2)
        ends = (g.ints(-2), g.ints(TABLE), g.ints(2))
        g.op("Slice", joined, *ends, out=["present_conv.0"])
        kernel = g.constant(np.linspace(-1, 1, HIDDEN * 3).reshape(HIDDEN, 1, 3), g.dtype)
        conv = g.op("Conv", joined, kernel, group=HIDDEN, kernel_shape=[3])
        return str(g.op("Add", hidden, g.op("Transpose", conv, perm=[0, 2, 1])))
    return hidden


def _frame(g: GraphWriter, model: OddModel, ids: str, triangle: Triangle | None) -> _Frame:
    length, total = g.dimension(ids, 1), g.dimension("attention_mask", 1)
    past = str(g.op("Sub", total, length))
    first, end = g.op("Squeeze", past), g.op("Squeeze", total)
    rows = g.op("Range", first, end, g.constant(1))
    keys = str(g.op("Range", g.constant(0), end, g.constant(1)))
    slots = Slots(g.unsqueeze(rows, 1), keys, past, length, total, ids, model.size, HEADS)
    mask = "attention_mask" if model.mask_dtype == "bool" else g.cast("attention_mask", "bool")
    causal = g.op("And", g.op("GreaterOrEqual", slots.rows, keys), g.unsqueeze(mask, 1, 2))
    odd = g.op("And", causal, MASKS[model.mask].write(g, slots))
    seen = {x: odd if x in model.window_layers else causal for x in range(model.num_layers)}
    if triangle is not None:
        kept = g.op("And", seen[triangle.layer], _triangle(g, slots, triangle))
        seen[triangle.layer] = kept
    cos, sin = _rotation(g, model, str(rows))
    ones = g.op("ReduceSum", g.cast("attention_mask", "int64"), g.ints(1), keepdims=0)
    lengths = (g.cast(g.op("Sub", ones, g.ints(1)), "int32"), g.cast(total, "int32"))
    return _Frame(slots, seen, cos, sin, lengths)


def _triangle(g: GraphWriter, s: Slots, triangle: Triangle) -> str:
    sink = g.op("Less", s.keys, g.constant(triangle.sink))
    near = g.op("Less", g.op("Sub", s.rows, s.keys), g.constant(triangle.window))
    last = g.op("GreaterOrEqual", s.rows, g.op("Sub", s.total, g.ints(triangle.last)))
    return str(g.op("Or", g.op("Or", sink, near), last))


def _rotation(g: GraphWriter, model: OddModel, rows: str) -> tuple[str, str]:
    """Cosines and sines of the new tokens, by the positions that the interface gives."""
    size = HEAD_SIZE // 2
    angles = np.arange(TABLE)[:, None] / 100.0 ** (np.arange(size) / size)
    if model.positions == "none":
        angles = np.zeros_like(angles)
    if model.positions in ("none", "slots"):
        at = g.unsqueeze(rows, 0)
    elif model.positions == "rank1":
        at = g.unsqueeze(g.graph_input("position_ids", "int64", "length"), 0)
    elif model.positions == "rank2":
        at = g.graph_input("position_ids", "int64", model.batch, "length")
    else:
        g.graph_input("position_ids", "int64", 3, model.batch, "length")
        at = str(g.op("Gather", "position_ids", g.constant(0)))
    if model.branches:  # beyond so many tokens the tables are others
        total = g.op("Squeeze", g.dimension("attention_mask", 1))
        longer = g.op("Greater", total, g.constant(2 * model.size))
        tables = g.choose(longer, [part(angles / 2) for part in (np.cos, np.sin)],
                          [part(angles) for part in (np.cos, np.sin)])  # fmt: skip
    else:
        tables = [g.constant(part(angles), g.dtype) for part in (np.cos, np.sin)]
    cos, sin = (g.unsqueeze(g.op("Gather", table, at), 1) for table in tables)
    return cos, sin


def _rotated(g: GraphWriter, heads: str, frame: _Frame) -> str:
    half = HEAD_SIZE // 2
    a, b = g.op("Split", heads, g.ints(half, half), count=2, axis=-1)
    real = g.op("Sub", g.op("Mul", a, frame.cos), g.op("Mul", b, frame.sin))
    other = g.op("Add", g.op("Mul", b, frame.cos), g.op("Mul", a, frame.sin))
    return str(g.op("Concat", real, other, axis=-1))


def _attention(
    g: GraphWriter,
    model: OddModel,
    layer: int,
    hidden: str,
    frame: _Frame,
    shared: tuple[str, str] | None,
) -> tuple[str, tuple[str, str]]:
    """Its result `[B, S, hidden]`, and its keys and values, which are `shared` where given."""
    rows = _norm(g, f"attention.{layer}", hidden)
    width = model.kv_heads * HEAD_SIZE
    query, key, value = (
        str(g.op("MatMul", rows, g.weight(f"{name}.{layer}", HIDDEN, size)))
        for name, size in (("query", HEADS * HEAD_SIZE), ("key", width), ("value", width))
    )
    query = _rotated(g, _heads(g, query, HEADS), frame)
    key = _rotated(g, _heads(g, key, model.kv_heads), frame)
    keys_and_values = shared or (key, value)
    if model.spelling == "group_query":
        result = _group_query(g, model, layer, (query, key, value), frame)
    else:
        if shared is None:
            values = _heads(g, value, model.kv_heads)
            keys_and_values = (
                _joined(g, model, PAST.format(layer, "key"), PRESENT.format(layer, "key"), key),
                _joined(
                    g, model, PAST.format(layer, "value"), PRESENT.format(layer, "value"), values
                ),
            )
        heads = Heads(query, *keys_and_values)
        result = attend(g, model, frame.slots, heads, frame.seen[layer])
    weight = g.weight(f"output.{layer}", HEADS * HEAD_SIZE, HIDDEN)
    return str(g.op("MatMul", result, weight)), keys_and_values


def _group_query(
    g: GraphWriter, model: OddModel, layer: int, rows: tuple[str, str, str], frame: _Frame
) -> str:
    def flat(heads: str) -> str:
        return str(g.op("Reshape", g.op("Transpose", heads, perm=[0, 2, 1, 3]), g.ints(0, 0, -1)))

    pasts, presents = [], []
    for name in ("key", "value"):
        past, present = model.cache_shape("past"), model.cache_shape("total")
        pasts.append(g.graph_input(PAST.format(layer, name), "float32", *past))
        presents.append(g.graph_output(PRESENT.format(layer, name), "float32", *present))
    query, key, value = rows
    inputs = [flat(query), flat(key), value, *pasts, *frame.lengths]
    return group_query(g, model, layer, frame.slots, inputs, [g.name("attended"), *presents])


def _joined(g: GraphWriter, model: OddModel, past: str, present: str, new: str) -> str:
    """New tokens `[B, G, S, D]` after their past, in the cache's layout and type; back again."""
    if model.cache == "none":
        return new
    swap, axis = [0, 2, 1, 3], 1 if model.cache == "BTHD" else 2

    def shape(tokens: str) -> tuple[int | str, ...]:
        sizes = model.cache_shape(tokens)
        return tuple(sizes[x] for x in swap) if model.cache == "BTHD" else sizes

    g.graph_input(past, model.cache_dtype, *shape("past"))
    g.graph_output(present, model.cache_dtype, *shape("total"))
    if model.cache_dtype != model.dtype:
        new = g.cast(new, model.cache_dtype)
    if model.cache == "BTHD":
        new = str(g.op("Transpose", new, perm=swap))
    direct = model.present == "joined"
    joined = g.op("Concat", past, new, axis=axis, out=[present] if direct else None)
    if model.present == "identity":
        g.op("Identity", joined, out=[present])
    if model.present == "cast":
        g.op("Cast", joined, to=g.outputs[-1].type.tensor_type.elem_type, out=[present])
    if model.cache == "BTHD":
        joined = g.op("Transpose", joined, perm=swap)
    return str(joined if model.cache_dtype == model.dtype else g.cast(joined, model.dtype))


def _heads(g: GraphWriter, rows: str, count: int) -> str:
    apart = g.op("Reshape", rows, g.ints(0, 0, count, HEAD_SIZE))
    return str(g.op("Transpose", apart, perm=[0, 2, 1, 3]))


def _norm(g: GraphWriter, name: str, hidden: str) -> str:
    scale = g.constant(np.linspace(0.7, 1.3, HIDDEN), g.dtype, name=f"norm.{name}")
    bias = g.constant(np.zeros(HIDDEN), g.dtype)
    if g.opset >= 17:
        return str(g.op("LayerNormalization", hidden, scale, bias, axis=-1))
    mean = g.op("ReduceMean", hidden, axes=[-1])
    centred = g.op("Sub", hidden, mean)
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), axes=[-1])
    deviation = g.op("Sqrt", g.op("Add", variance, g.number(1e-5)))
    return str(g.op("Mul", g.op("Div", centred, deviation), scale))


def _mlp(g: GraphWriter, layer: int, hidden: str) -> str:
    rows = g.op("MatMul", _norm(g, f"mlp.{layer}", hidden), g.weight(f"up.{layer}", HIDDEN, 64))
    gated = g.op("Mul", rows, g.op("Sigmoid", rows))
    return str(g.op("MatMul", gated, g.weight(f"down.{layer}", 64, HIDDEN)))


def _head(g: GraphWriter, model: OddModel, hidden: str) -> None:
    if model.extra == "router_first":
        routes = g.op("MatMul", hidden, g.weight("router", HIDDEN, ROUTES))
        g.op("Cast", routes, to=1, out=["router_logits"])
        g.outputs.insert(
            0,
            onnx.helper.make_tensor_value_info("router_logits", 1, [model.batch, "length", ROUTES]),
        )
    rows = "length"
    if model.extra == "keep_logits":
        count = g.graph_input("num_logits_to_keep", "int64")
        hidden = g.tail(hidden, g.unsqueeze(g.op("Neg", count), 0), 1)
        rows = "kept"
    if model.extra == "last_row":
        hidden = g.tail(hidden, g.ints(-1), 1)
        rows = "one"
    head = g.weight("head", HIDDEN, VOCABULARY)
    if g.dtype == "float32":
        g.op("MatMul", hidden, head, out=["logits"])
    else:
        g.op("Cast", g.op("MatMul", hidden, head), to=1, out=["logits"])
    g.graph_output("logits", "float32", model.batch, rows, VOCABULARY)
    if model.extra != "router_first":  # logits first, as nearly all have them
        g.outputs.insert(0, g.outputs.pop())
