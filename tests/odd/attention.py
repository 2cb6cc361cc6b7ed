"""Spellings of one attention layer: the products, the repeat of K/V heads, the mask's way in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.odd.graph_writer import CONTRIB, GraphWriter
from tests.odd.masks import Slots
from tests.odd.odd_model import CAP, HEAD_SIZE, HEADS, OddModel
from tests.odd.scales import SCALES, Scaled


@dataclass(frozen=True)
class Heads:
    """Queries `[B, H, S, D]`, and keys and values with their past, `[B, G, T, D]`."""

    query: str
    key: str
    value: str


def attend(g: GraphWriter, model: OddModel, slots: Slots, heads: Heads, seen: str) -> str:
    """`[B, S, H*D]` of heads under the bool mask `seen`, which broadcasts to `[B, H, S, T]`."""
    scale = model.factor
    if model.spelling == "attention":
        more = {"softcap": CAP} if model.attribute == "softcap" else {}
        output = g.op("Attention", heads.query, heads.key, heads.value, seen, scale=scale, **more)
        return _merged(g, str(output))
    kind = SCALES[model.scale]
    key, value = _repeated(g, model, heads.key), _repeated(g, model, heads.value)
    scaled = kind.before(g, slots, Scaled(heads.query, key), scale)
    scores = kind.after(g, slots, _scores(g, model, slots, scaled), scale)
    weights = _masked_softmax(g, model, scores, seen)
    return _merged(g, _weighted(g, model, slots, weights, value))


def group_query(
    g: GraphWriter,
    model: OddModel,
    layer: int,
    slots: Slots,
    inputs: list[str],
    outputs: list[str],
) -> str:
    """The contrib node over flat rows; `inputs` end with the two lengths."""
    windowed = model.mask != "causal" and layer in model.window_layers
    more: dict[str, float] = {"scale": model.factor} if model.attribute == "scale" else {}
    if model.attribute == "softcap":
        more["softcap"] = CAP
    if model.attribute == "smooth_softmax":
        more["smooth_softmax"] = 1
    if model.attribute == "attention_bias":
        slope = g.constant(np.linspace(0.1, 0.3, HEADS).reshape(1, -1, 1, 1), np.float32)
        distance = g.cast(g.op("Sub", slots.keys, slots.rows), "float32")
        inputs = [*inputs, "", "", "", g.op("Mul", slope, distance)]
    if model.attribute == "head_sink":
        inputs = [*inputs, "", "", "", "", g.constant(np.ones(HEADS), np.float32)]
    result = g.op(
        "GroupQueryAttention",
        *inputs,
        out=outputs,
        domain=CONTRIB,
        num_heads=HEADS,
        kv_num_heads=model.kv_heads,
        local_window_size=model.size if windowed else -1,
        **more,
    )
    return str(result[0])


def _repeated(g: GraphWriter, model: OddModel, heads: str) -> str:
    """`[B, G, T, D]` as `[B, H, T, D]`, head `g` for the queries `g*H/G` and on."""
    times = HEADS // model.kv_heads
    if model.repeat in ("inside", "broadcast"):
        return heads
    if model.repeat == "gather":
        index = np.repeat(np.arange(model.kv_heads), times)
        return str(g.op("Gather", heads, g.constant(index), axis=1))
    if model.repeat == "concat":
        if model.kv_heads == 1:
            return str(g.op("Concat", *[heads] * times, axis=1))
        parts = g.op("Split", heads, g.ints(*[1] * model.kv_heads), count=model.kv_heads, axis=1)
        return str(g.op("Concat", *[part for part in parts for _ in range(times)], axis=1))
    apart = g.unsqueeze(heads, 2)
    counts = g.ints(1, 1, times, 1, 1)
    grown = g.op("Tile" if model.repeat == "tile" else "Expand", apart, counts)
    return str(g.op("Reshape", grown, g.ints(0, HEADS, -1, HEAD_SIZE)))


def _scores(g: GraphWriter, model: OddModel, slots: Slots, x: Scaled) -> str:
    if model.spelling == "einsum" and model.repeat != "broadcast":
        return str(g.op("Einsum", x.query, x.key, equation="bhsd,bhtd->bhst"))
    if model.spelling == "batched" and model.repeat != "broadcast":
        query = _batched(g, x.query, slots.length, g.ints(HEAD_SIZE))
        key = _batched(g, x.key, slots.total, g.ints(HEAD_SIZE))
        product = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 2, 1]))
        sizes = g.op("Concat", g.ints(-1, HEADS), slots.length, slots.total, axis=0)
        return str(g.op("Reshape", product, sizes))
    return str(g.op("MatMul", x.query, g.op("Transpose", x.key, perm=[0, 1, 3, 2])))


def _masked_softmax(g: GraphWriter, model: OddModel, scores: str, seen: str) -> str:
    least = g.number(float(np.finfo(g.dtype).min))
    if model.mask_form == "add":
        bias = g.op("Where", seen, g.number(0), least)
        return str(g.op("Softmax", g.op("Add", scores, bias), axis=-1))
    if model.mask_form == "arithmetic":
        hidden = g.op("Sub", g.number(1), g.cast(seen, g.dtype))
        return str(g.op("Softmax", g.op("Add", scores, g.op("Mul", hidden, least)), axis=-1))
    if model.mask_form == "where_after":
        masked = g.op("Where", seen, scores, g.number(-1e9 if g.dtype == "float32" else -6e4))
        return str(g.op("Softmax", masked, axis=-1))
    return str(g.op("Softmax", g.op("Where", seen, scores, least), axis=-1))


def _weighted(g: GraphWriter, model: OddModel, slots: Slots, weights: str, value: str) -> str:
    if model.spelling == "einsum" and model.repeat != "broadcast":
        return str(g.op("Einsum", weights, value, equation="bhst,bhtd->bhsd"))
    if model.spelling == "batched" and model.repeat != "broadcast":
        rows = _batched(g, weights, slots.length, slots.total)
        values = _batched(g, value, slots.total, g.ints(HEAD_SIZE))
        product = g.op("MatMul", rows, values)
        sizes = g.op("Concat", g.ints(-1, HEADS), slots.length, g.ints(HEAD_SIZE), axis=0)
        return str(g.op("Reshape", product, sizes))
    return str(g.op("MatMul", weights, value))


def _merged(g: GraphWriter, heads: str) -> str:
    rows = g.op("Transpose", heads, perm=[0, 2, 1, 3])
    return str(g.op("Reshape", rows, g.ints(0, 0, HEADS * HEAD_SIZE)))


def _batched(g: GraphWriter, heads: str, tokens: str, width: str) -> str:
    """`[B, H, tokens, width]` as `[B*H, tokens, width]`."""
    return str(g.op("Reshape", heads, g.op("Concat", g.ints(-1), tokens, width, axis=0)))
