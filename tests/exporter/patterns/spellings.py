"""A tiny decoder whose attention is spelled by choices: the same numbers, other nodes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.sites import Example
from trianglemix.exporter.patterns._example import (
    SHAPE,
    ExampleLayer,
    additive_mask,
    build_example,
    merged,
)

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "form": ("softmax", "attention", "multi_head"),
    "repeat": ("expand", "tile", "gather", "split", "stack", "grouped", "flat", "one_head"),
    "cache": ("BHTD", "BTHD", "BHDT"),
    "scale": ("mul", "div", "query", "keys", "root", "after_cast"),
    "product": ("matmul", "einsum"),
    "softmax": ("softmax", "axis", "parts", "plain_parts", "log"),
    "mask": ("add", "where", "old"),
    "idle": ("none", "identity", "dropout"),
    "types": ("float", "half_inside", "half_cache", "half_all_float_softmax", "float_cache"),
    "present": ("itself", "identity", "cast"),
    "order": ("sorted", "shuffled"),
}
_HALF: Final = ir.DataType.FLOAT16
_FLOAT: Final = ir.DataType.FLOAT
_LEAST: Final = -3e4
_OF_PRODUCTS: Final = ("grouped", "flat", "one_head")


@dataclass(frozen=True)
class Spelling:
    """One of `CHOICES` each."""

    form: str = "softmax"
    repeat: str = "expand"
    cache: str = "BHTD"
    scale: str = "mul"
    product: str = "matmul"
    softmax: str = "softmax"
    mask: str = "add"
    idle: str = "none"
    types: str = "float"
    present: str = "itself"
    order: str = "sorted"

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return 1 if self.repeat == "one_head" else SHAPE.kv_num_heads

    @property
    def is_half(self) -> bool:
        return self.types != "float"

    @property
    def inside(self) -> ir.DataType:
        """The type of the products."""
        return (
            _HALF
            if self.types in ("half_inside", "half_all_float_softmax", "float_cache")
            else _FLOAT
        )

    @property
    def joined(self) -> ir.DataType:
        """The type in which new tokens are appended."""
        return _FLOAT if self.types in ("float", "float_cache") else _HALF

    @property
    def stored(self) -> ir.DataType:
        """The type of the graph's caches."""
        return _HALF if self.types in ("half_cache", "half_all_float_softmax") else _FLOAT


def draw(seed: int) -> Spelling:
    """A random spelling."""
    chosen = random.Random(seed)
    drawn = {field.name: chosen.choice(CHOICES[field.name]) for field in fields(Spelling)}
    if drawn["form"] != "softmax" and drawn["repeat"] in _OF_PRODUCTS:
        drawn["repeat"] = "expand"
    if drawn["form"] == "multi_head":  # has no float16 kernel on the CPU
        drawn["types"] = chosen.choice(("float", "half_cache"))
    return Spelling(**drawn)


def spelled(spelling: Spelling, seed: int = 0) -> Example:
    """The example decoder in a spelling, without sizes of its inner values."""
    opset = 23 if spelling.form == "attention" else 18
    example = build_example(
        lambda b, x: _Speller(b, x, spelling).attend(), opset=opset, domains=("com.microsoft",)
    )
    graph = example.model.graph
    for value in graph.outputs[1:]:
        value.type, value.shape = ir.TensorType(spelling.stored), None
    if spelling.order == "shuffled":
        nodes = list(graph)
        graph.remove(nodes)
        random.Random(seed).shuffle(nodes)
        graph.extend(nodes)
    return example


@dataclass
class _Speller:
    """Builds one attention."""

    build: GraphBuilder
    layer: ExampleLayer
    spelling: Spelling

    def attend(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Output, present key, present value."""
        spelling, build = self.spelling, self.build
        if spelling.heads == 1:  # the first head alone
            first = build.ints(0), build.ints(SHAPE.head_size), build.ints(2)
            new = [build.op("Slice", x, *first) for x in (self.layer.key, self.layer.value)]
        else:
            new = [self.layer.key, self.layer.value]
        key, value = (
            self.append(past, rows, axes)
            for past, rows, axes in (
                (self.layer.past_key, new[0], spelling.cache),
                (self.layer.past_value, new[1], spelling.cache.replace("BHDT", "BHTD")),
            )
        )
        present = [self.handed_out(x) for x in (key, value)]
        keys = self.moved(self.typed(key), spelling.cache)
        values = self.moved(self.typed(value), spelling.cache.replace("BHDT", "BHTD"))
        rows = self.split(self.layer.query, SHAPE.num_heads)
        query = self.typed(build.op("Transpose", rows, perm=[0, 2, 1, 3]))
        if spelling.form == "multi_head":
            output = self.multi_head(query, self.repeated(keys), self.repeated(values))
            return output, present[0], present[1]
        if spelling.form == "attention":
            bias = build.cast(additive_mask(build, self.layer), spelling.inside)
            result = build.op("Attention", query, self.repeated(keys), self.repeated(values), bias)
        else:
            result = self.in_parts(query, keys, values)
        output = merged(build, result)
        output = build.cast(output, _FLOAT) if spelling.inside == _HALF else output
        return output, present[0], present[1]

    def multi_head(self, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        rows = [merged(self.build, x) for x in (query, keys, values)]
        bias = additive_mask(self.build, self.layer)
        return self.build.op(
            "MultiHeadAttention", *rows, None, None, bias,
            domain="com.microsoft", num_heads=SHAPE.num_heads,
        )  # fmt: skip

    def in_parts(self, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Products and a softmax; `[B, H, S, D]`."""
        build = self.build
        weights = self.weights(self.scores(query, self.repeated(keys)))
        result = self.summed(weights, self.repeated(values))
        if self.spelling.repeat == "grouped":
            sizes = build.ints(0, SHAPE.num_heads, -1, SHAPE.head_size)
            result = build.op("Reshape", result, sizes)
        return self.apart(result) if self.spelling.repeat == "flat" else result

    def append(self, past: ir.Value, rows: ir.Value, axes: str) -> ir.Value:
        spelling, build = self.spelling, self.build
        sizes = {"B": "batch", "H": spelling.heads, "T": "past", "D": SHAPE.head_size}
        past.shape = ir.Shape([sizes[axis] for axis in axes])
        past.type = ir.TensorType(spelling.stored)
        new = self.split(rows, spelling.heads)
        if axes != "BTHD":
            new = build.op("Transpose", new, perm=["BTHD".index(axis) for axis in axes])
        if spelling.types in ("half_cache", "half_all_float_softmax", "half_inside"):
            new = build.cast(new, _HALF)
        if spelling.types == "float_cache":
            new = build.cast(build.cast(new, _HALF), _FLOAT)
        if spelling.stored != spelling.joined:
            past = build.cast(past, spelling.joined)
        return self.idle(build.op("Concat", past, self.idle(new), axis=axes.index("T")))

    def handed_out(self, joined: ir.Value) -> ir.Value:
        spelling, build = self.spelling, self.build
        if spelling.stored != spelling.joined:
            return build.cast(joined, spelling.stored)
        if spelling.present == "cast":
            return build.cast(joined, spelling.stored)
        return build.op("Identity", joined) if spelling.present == "identity" else joined

    def typed(self, value: ir.Value) -> ir.Value:
        return self.build.cast(value, self.spelling.inside) if self.spelling.is_half else value

    def idle(self, value: ir.Value) -> ir.Value:
        kind = self.spelling.idle
        return value if kind == "none" else self.build.op(kind.capitalize(), value)

    def split(self, rows: ir.Value, heads: int) -> ir.Value:
        """`[B, S, heads, D]`."""
        return self.build.op("Reshape", rows, self.build.ints(0, 0, heads, SHAPE.head_size))

    def moved(self, joined: ir.Value, axes: str) -> ir.Value:
        """`[B, G, T, D]`."""
        if axes == "BHTD":
            return joined
        return self.build.op("Transpose", joined, perm=[axes.index(axis) for axis in "BHTD"])

    def repeated(self, heads: ir.Value) -> ir.Value:
        """`[B, H, T, D]`, or what the product takes in its place."""
        return _REPEATS[self.spelling.repeat](self, heads)

    def apart(self, flat: ir.Value) -> ir.Value:
        """`[B, H, x, y]` of `[B*H, x, y]`."""
        build = self.build
        sizes = [build.ints(-1, SHAPE.num_heads), build.op("Shape", flat, start=1, end=3)]
        return build.op("Reshape", flat, build.op("Concat", *sizes, axis=0))

    def factor(self, power: float, divides: bool = False) -> ir.Value:
        number = SHAPE.head_size ** (power if divides else -power)
        name = f"factor_{number:g}_{self.spelling.inside.name}"
        return self.build.constant(name, np.array(number, self.spelling.inside.numpy()))

    def scores(self, query: ir.Value, keys: ir.Value) -> ir.Value:
        """Scaled products; `[B, H, S, T]`, or with their heads in one or two other axes."""
        build, scale = self.build, self.spelling.scale
        if scale in ("query", "root"):
            query = build.op("Mul", query, self.factor(0.5 if scale == "query" else 0.25))
        if scale in ("keys", "root"):
            keys = build.op("Mul", self.factor(0.5 if scale == "keys" else 0.25), keys)
        product = self.product(query, keys)
        if scale == "mul":
            product = build.op("Mul", product, self.factor(0.5))
        if scale == "div":
            product = build.op("Div", product, self.factor(0.5, divides=True))
        if scale == "after_cast":
            root = build.constant("root_float", np.array(SHAPE.head_size**-0.5, np.float32))
            product = build.op("Mul", build.cast(product, _FLOAT), root)
            product = build.cast(product, self.spelling.inside)
        return product

    def product(self, query: ir.Value, keys: ir.Value) -> ir.Value:
        build, repeat = self.build, self.spelling.repeat
        if repeat == "grouped":
            parts = build.ints(
                0, SHAPE.kv_num_heads, SHAPE.num_heads // SHAPE.kv_num_heads, -1, SHAPE.head_size
            )
            query = build.op("Reshape", query, parts)
            if self.spelling.product == "einsum":
                keys = build.op("Squeeze", keys, build.ints(2))
                return build.op("Einsum", query, keys, equation="bgrsd,bgtd->bgrst")
            return build.op("MatMul", query, build.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
        if repeat == "flat":
            query = build.op("Reshape", query, self.flat_sizes(query))
            if self.spelling.product == "einsum":
                return build.op("Einsum", query, keys, equation="nsd,ntd->nst")
            return build.op("MatMul", query, build.op("Transpose", keys, perm=[0, 2, 1]))
        if self.spelling.product == "einsum" and repeat != "one_head":
            return build.op("Einsum", query, keys, equation="bhsd,bhtd->bhst")
        return build.op("MatMul", query, build.op("Transpose", keys, perm=[0, 1, 3, 2]))

    def flat_sizes(self, heads: ir.Value) -> ir.Value:
        """`[-1, x, D]` of `[B, H, x, D]`."""
        build = self.build
        parts = [build.ints(-1), build.dimension(heads, 2), build.ints(SHAPE.head_size)]
        return build.op("Concat", *parts, axis=0)

    def weights(self, scores: ir.Value) -> ir.Value:
        build, repeat, kind = self.build, self.spelling.repeat, self.spelling.softmax
        dtype = self.spelling.inside
        mask = additive_mask(build, self.layer)
        if repeat == "grouped":
            mask = build.op("Unsqueeze", mask, build.ints(2))
        flat = repeat == "flat"
        masked = self.masked(self.apart(scores) if flat else scores, mask)
        if flat:
            last = build.op("Shape", masked, start=2, end=4)
            masked = build.op("Reshape", masked, build.op("Concat", build.ints(-1), last, axis=0))
        if dtype == _HALF:
            masked = build.cast(masked, _FLOAT)
        axis = {"flat": 2, "grouped": 4}.get(repeat, 3) if kind == "axis" else -1
        weights = _SOFTMAX.get(kind, _softmax)(build, masked, axis)
        return build.cast(weights, dtype) if dtype == _HALF else self.idle(weights)

    def masked(self, scores: ir.Value, mask: ir.Value) -> ir.Value:
        build, kind, dtype = self.build, self.spelling.mask, self.spelling.inside
        number = dtype.numpy()
        least = build.constant(f"least_{dtype.name}", np.array(_LEAST, number))
        none = build.constant("none", np.array(0, np.float32))
        seen = build.op("Equal", mask, none)
        if kind == "where":
            return build.op("Where", seen, scores, least)
        if kind == "old":  # GPT-2: w * b - 1e4 * (1 - b)
            real = build.cast(seen, dtype)
            one = build.constant(f"one_{dtype.name}", np.array(1, number))
            away = build.op("Mul", build.op("Sub", one, real), least)
            return build.op("Add", build.op("Mul", scores, real), away)
        zero = build.constant(f"zero_{dtype.name}", np.array(0, number))
        return build.op("Add", scores, build.op("Where", seen, zero, least))

    def summed(self, weights: ir.Value, values: ir.Value) -> ir.Value:
        build, repeat = self.build, self.spelling.repeat
        if self.spelling.product == "matmul" or repeat == "one_head":
            return build.op("MatMul", weights, values)
        if repeat == "grouped":
            values = build.op("Squeeze", values, build.ints(2))
            return build.op("Einsum", weights, values, equation="bgrst,bgtd->bgrsd")
        equation = "nst,ntd->nsd" if repeat == "flat" else "bhst,bhtd->bhsd"
        return build.op("Einsum", weights, values, equation=equation)


def _expand(speller: _Speller, heads: ir.Value) -> ir.Value:
    build, times = speller.build, SHAPE.num_heads // speller.spelling.heads
    apart = build.op("Unsqueeze", heads, build.ints(2))
    expanded = build.op("Expand", apart, build.ints(1, 1, times, 1, 1))
    return build.op("Reshape", expanded, build.ints(0, SHAPE.num_heads, -1, SHAPE.head_size))


def _tile(speller: _Speller, heads: ir.Value) -> ir.Value:
    build, times = speller.build, SHAPE.num_heads // speller.spelling.heads
    apart = build.op("Unsqueeze", heads, build.ints(2))
    tiled = build.op("Tile", apart, build.ints(1, 1, times, 1, 1))
    return build.op("Reshape", tiled, build.ints(0, SHAPE.num_heads, -1, SHAPE.head_size))


def _gather(speller: _Speller, heads: ir.Value) -> ir.Value:
    times = SHAPE.num_heads // SHAPE.kv_num_heads
    index = np.repeat(np.arange(SHAPE.kv_num_heads), times)
    return speller.build.op("Gather", heads, speller.build.constant("repeat", index), axis=1)


def _split(speller: _Speller, heads: ir.Value) -> ir.Value:
    build, count = speller.build, SHAPE.kv_num_heads
    node = build.node(
        "Split", [heads], attributes={"axis": 1, "num_outputs": count}, num_outputs=count
    )
    parts = [part for part in node.outputs for _ in range(SHAPE.num_heads // count)]
    return build.op("Concat", *parts, axis=1)


def _stack(speller: _Speller, heads: ir.Value) -> ir.Value:
    build, times = speller.build, SHAPE.num_heads // SHAPE.kv_num_heads
    parts = [build.op("Unsqueeze", heads, build.ints(2)) for _ in range(times)]
    stacked = build.op("Concat", *parts, axis=2)
    return build.op("Reshape", stacked, build.ints(0, SHAPE.num_heads, -1, SHAPE.head_size))


def _grouped(speller: _Speller, heads: ir.Value) -> ir.Value:
    return speller.build.op("Unsqueeze", heads, speller.build.ints(2))


def _flat(speller: _Speller, heads: ir.Value) -> ir.Value:
    return speller.build.op("Reshape", _expand(speller, heads), speller.flat_sizes(heads))


_REPEATS: Final[dict[str, Callable[[_Speller, ir.Value], ir.Value]]] = {
    "expand": _expand,
    "tile": _tile,
    "gather": _gather,
    "split": _split,
    "stack": _stack,
    "grouped": _grouped,
    "flat": _flat,
    "one_head": lambda speller, heads: heads,
}


def _softmax(build: GraphBuilder, scores: ir.Value, axis: int) -> ir.Value:
    return build.op("Softmax", scores, axis=axis)


def _parts(build: GraphBuilder, scores: ir.Value, axis: int) -> ir.Value:
    """Of the scores less their largest."""
    largest = build.op("ReduceMax", scores, build.ints(-1), keepdims=1)
    return _plain_parts(build, build.op("Sub", scores, largest), axis)


def _plain_parts(build: GraphBuilder, scores: ir.Value, axis: int) -> ir.Value:
    power = build.op("Exp", scores)
    return build.op("Div", power, build.op("ReduceSum", power, build.ints(axis), keepdims=1))


def _log(build: GraphBuilder, scores: ir.Value, axis: int) -> ir.Value:
    return build.op("Exp", build.op("LogSoftmax", scores, axis=axis))


_SOFTMAX: Final[dict[str, Callable[[GraphBuilder, ir.Value, int], ir.Value]]] = {
    "parts": _parts,
    "plain_parts": _plain_parts,
    "log": _log,
}
