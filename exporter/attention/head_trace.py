"""Follows the keys or values of an attention back to the new tokens and their cache.

The walk is loose: it guesses which axis is which from the way the graph moves them, and what it
finds is measured before anything is believed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.graph.walk import (
    Factor,
    is_op,
    needed_input,
    optional_input,
    peel_factor,
    producer_of,
    small_constant,
)

_MAX_STEPS: Final = 48
_CACHE_AXES: Final = {1: "BTHD", 2: "BHTD", 3: "BHDT"}
"""Axes of a cache, by the one along which the new tokens are appended."""
_REPEATS: Final = ("Expand", "Tile")
_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Heads:
    """Where a tensor of keys or values comes from.

    `axes` names the axes of `value`: B batch, H key/value heads, R query heads of each, T tokens,
    D; N stands for batch and heads in one. `past` is what the new tokens were appended to,
    `joined` the result of that; both have the axes of `value`.
    """

    value: ir.Value
    axes: str
    factors: tuple[Factor, ...] = ()
    past: ir.Value | None = None
    joined: ir.Value | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every axis has one meaning, so that numbers can be given for the value."""
        return sorted(self.axes) == sorted("BHTD")


def trace_heads(value: ir.Value, axes: str, content: Collection[ir.Value]) -> Heads:
    """Walks back from a product's operand: factors, casts, moves of axes, repeats, the append.

    Without an append it ends at the earliest value whose axes are still known.

    Raises:
        CutError: the append is none that the operator can do.
    """
    best = here = Heads(value, axes)
    for _ in range(_MAX_STEPS):
        appended = _append(here)
        if appended is not None:
            return appended
        step = _step_back(here, content)
        if step is None:
            break
        here = step
        best = here if here.is_whole else best
    _check_own_cache(here.value)
    if best.value.is_graph_input():
        raise CutError(
            f"its keys or values are the graph input {best.value.name}, to which nothing is "
            "appended (attention over an encoder, or a static cache), which the operator has no "
            "counterpart for; export a decoder-only model with a growing cache"
        )
    return best


def _check_own_cache(value: ir.Value) -> None:
    """Raises CutError for keys that are cut out of what a Concat has appended to a cache."""
    part = producer_of(value, "Split", "Slice")
    joined = producer_of(root_of(value), "Concat") if part is not None else None
    if joined is None or len(joined.inputs) != 2:
        return
    cache = root_of(needed_input(joined, 0))
    if cache.is_graph_input() and cache.dtype in _FLOATS:
        raise CutError(
            f"its keys or values are a part of the cache {cache.name}, which holds both or more "
            "than a layer reads; export with keys and values as caches of their own, "
            "[batch, heads, tokens, size]"
        )


def _append(heads: Heads) -> Heads | None:
    """Past and new tokens of a Concat that appends them."""
    node = producer_of(heads.value, "Concat")
    if node is None or len(node.inputs) != 2 or _same_source(node) is not None:
        return None
    past, new = needed_input(node, 0), needed_input(node, 1)
    source = root_of(past)
    if not source.is_graph_input() or source.dtype not in (*_FLOATS, None):
        return None
    rank = next((len(x.shape) for x in (past, heads.value, new) if x.shape is not None), 4)
    axis = node.attributes.get_int("axis", 0)
    axis += rank if axis < 0 else 0
    if rank != 4:
        raise CutError(
            f"its cache {source.name} has {rank} axes where keys are appended to it, not 4 (batch "
            "and heads in one, or one head without an axis), which the operator cannot read; "
            "export with a cache [batch, heads, tokens, size]"
        )
    if axis not in _CACHE_AXES:
        raise CutError(f"its cache {source.name} is appended to along the batch axis")
    return Heads(new, _CACHE_AXES[axis], heads.factors, past=past, joined=heads.value)


def root_of(value: ir.Value) -> ir.Value:
    """What a value is a view, a cast or a slice of, followed back as far as that goes."""
    for _ in range(_MAX_STEPS):
        node = value.producer()
        if not is_op(
            node, "Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Gather",
            "Split", "Slice",
        ):  # fmt: skip
            return value
        assert node is not None
        value = needed_input(node, 0)
    return value


def _step_back(heads: Heads, content: Collection[ir.Value]) -> Heads | None:
    peeled = peel_factor(heads.value, content)
    if peeled is not None:
        factors = heads.factors if peeled[1] is None else (*heads.factors, peeled[1])
        return replace(heads, value=peeled[0], factors=factors)
    node, axes = heads.value.producer(), heads.axes
    if node is None:
        return None
    if is_op(node, "Concat"):
        source = _same_source(node)
        return None if source is None else _through_unsqueeze(heads, source)
    if not _moves_heads(node, content):
        return None
    source = needed_input(node, 0)
    if is_op(node, "Transpose"):
        axes = _axes_before_transpose(node, axes)
    elif is_op(node, "Unsqueeze"):
        axes = _axes_before_unsqueeze(node, axes)
    elif is_op(node, "Reshape", "Squeeze"):
        axes = axes_before_reshape(axes, _rank(source, axes))
    elif is_op(node, "Gather") and source.shape is not None:
        axes = axes_before_reshape(axes, len(source.shape))
    return replace(heads, value=source, axes=axes)


def _moves_heads(node: ir.Node, content: Collection[ir.Value]) -> bool:
    """Whether a node only moves or repeats its first input."""
    if is_op(node, "Gather"):  # a repeat as an index that does not depend on the input
        return needed_input(node, 1) not in content and needed_input(node, 0) in content
    return is_op(node, "Transpose", "Reshape", "Unsqueeze", "Squeeze", *_REPEATS)


def _same_source(concat: ir.Node) -> ir.Value | None:
    """The one value that every input of a Concat is, or is a part of: a repeat spelled out."""
    sources = {_part_of(value) for value in concat.inputs if value is not None}
    return sources.pop() if len(sources) == 1 and len(concat.inputs) > 1 else None


def _part_of(value: ir.Value) -> ir.Value:
    node = producer_of(value, "Split", "Slice", "Gather", "Unsqueeze")
    return value if node is None else needed_input(node, 0)


def _through_unsqueeze(heads: Heads, source: ir.Value) -> Heads:
    """The source of a repeat by Concat; parts that got an axis for it (torch.stack) lose it."""
    concat = heads.value.producer()
    assert concat is not None
    node = producer_of(concat.inputs[0], "Unsqueeze")
    axes = heads.axes if node is None else _axes_before_unsqueeze(node, heads.axes)
    return replace(heads, value=source, axes=axes)


def _axes_before_transpose(transpose: ir.Node, axes: str) -> str:
    """Names of the axes of a Transpose's input, given its output's."""
    order = list(transpose.attributes.get_ints("perm", range(len(axes))[::-1]))
    if len(order) != len(axes):
        return ""
    before = [""] * len(axes)
    for axis, source in enumerate(order):
        before[source] = axes[axis]
    return "".join(before)


def _axes_before_unsqueeze(unsqueeze: ir.Node, axes: str) -> str:
    added = small_constant(optional_input(unsqueeze, 1))
    if added is None or added.size != 1 or not axes:
        return ""
    axis = int(added.reshape(-1)[0]) % len(axes)
    return axes[:axis] + axes[axis + 1 :]


def axes_before_reshape(axes: str, rank: int | None) -> str:
    """The likeliest axes before heads were merged, split or repeated; empty where none is likely.

    `rank` is the number of axes before.
    """
    if rank == len(axes):
        return axes
    merged = {
        (4, 5): axes.replace("H", "HR") if "R" not in axes else "",
        (5, 4): axes.replace("R", "") if "HR" in axes else "",
        (4, 3): axes.replace("BH", "N") if "BH" in axes else "",
        (3, 4): axes.replace("N", "BH") if "N" in axes else "",
        (3, 5): axes.replace("N", "BHR") if "N" in axes else "",
    }
    return merged.get((len(axes), rank or 0), "")


def _rank(value: ir.Value, axes_after: str) -> int | None:
    """Number of axes of what a Reshape reads; one more than after where it closes a repeat."""
    if value.shape is not None:
        return len(value.shape)
    repeat = producer_of(value, *_REPEATS)
    if repeat is not None and producer_of(repeat.inputs[0], "Unsqueeze") is not None:
        return len(axes_after) + 1
    transpose = producer_of(value, "Transpose")
    order = transpose.attributes.get_ints("perm", ()) if transpose else ()
    return len(order) or None
