"""What an input that is no cache is for: by its name, type and shape, and what it feeds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.lengths import PROMPT_LENGTH
from trianglemix.exporter.graph.roles import (
    FLOATS,
    INTEGERS,
    POSITIONS,
    GraphRoles,
    is_score_mask,
    rank,
    turns,
)
from trianglemix.exporter.graph.walk import is_op
from trianglemix.manifest.interface import GraphInput, InputRole, Shape, fixed_length

_SECTIONED: Final = 3  # rank of position ids [3, B, S]
_START: Final = re.compile(r"offset|start|past|cache|pos|step")
_SAME: Final = ("Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Flatten")


@dataclass(frozen=True)
class _Kind:
    """Inputs that are known by their names: the types and the ranks that they may have."""

    role: InputRole
    names: tuple[str, ...]
    types: tuple[ir.DataType, ...] = INTEGERS
    ranks: tuple[int, ...] = (0, 1)


_BY_NAME: Final = (
    _Kind("token_type_ids", ("token_type_ids", "mm_token_type_ids"), ranks=(2,)),
    _Kind("cache_position", ("cache_position", "cache_positions"), ranks=(1,)),
    _Kind("num_logits_to_keep", ("num_logits_to_keep", "logits_to_keep")),
    _Kind("seqlens_k", ("seqlens_k",), ranks=(1, 2)),
    _Kind("total_length", ("total_sequence_length", "total_seq_len", "total_length")),
    _Kind("past_length", ("past_sequence_length", "past_seq_len", "past_length", "past_len",
                          "past_key_values_length", "start_pos", "start_position")),
    _Kind("beam_idx", ("beam_idx",), ranks=(1,)),
    _Kind("use_cache_branch", ("use_cache_branch",), (ir.DataType.BOOL,)),
    _Kind("inputs_embeds", ("inputs_embeds", "input_embeds"), FLOATS, (3,)),
)  # fmt: skip


def classify(value: ir.Value, graph: ir.Graph, roles: GraphRoles) -> GraphInput:
    """An input that is no cache, with its role; "unknown" where nothing tells it."""
    name = str(value.name)
    basis = GraphInput(name, "unknown", dtype_name(value), shape_of(value))
    if value is roles.input_ids:
        return replace(basis, role="input_ids", token_axis=1)
    if value is roles.attention_mask:
        return replace(basis, role="attention_mask", token_axis=1)
    if name == PROMPT_LENGTH:
        return replace(basis, role="prompt_length")
    known = _by_kind(value, basis, roles)
    if known is None and (value is roles.position_ids or _is_positions(value, graph, roles)):
        return _positions(basis)
    if known is None and _begins_positions(value):
        known = replace(basis, role="past_length", batch_axis=None)
    if known is not None and (name not in graph.initializers or fixed_length((known,)) is None):
        return known
    if name in graph.initializers:  # also where its default fits, but not the tokens of a call
        return replace(basis, role="optional", batch_axis=None)
    return replace(basis, role="score_mask") if is_score_mask(value) else basis


def _by_kind(value: ir.Value, basis: GraphInput, roles: GraphRoles) -> GraphInput | None:
    for kind in _BY_NAME:
        fits = value.dtype in kind.types and rank(value) in (None, *kind.ranks)
        if not (basis.name in kind.names and fits):
            continue
        if kind.role == "cache_position":
            return replace(basis, role=kind.role, batch_axis=None, token_axis=0)
        if kind.role == "token_type_ids" and _is_of_all_tokens(value, roles):
            return replace(basis, role="all_token_type_ids")
        if kind.role in ("token_type_ids", "inputs_embeds"):
            return replace(basis, role=kind.role, token_axis=1)
        by_row = kind.role in ("seqlens_k", "beam_idx")
        return replace(basis, role=kind.role, batch_axis=0 if by_row else None)
    return None


def _is_positions(value: ir.Value, graph: ir.Graph, roles: GraphRoles) -> bool:
    """By its name; else by the rotation that it turns, as one number for each new token."""
    name = str(value.name)
    if value.dtype not in INTEGERS or rank(value) == 0:
        return False
    exact = any(x.name == "position_ids" for x in graph.inputs)  # others are an encoder's
    if name == "position_ids" or (not exact and ("position_ids" in name or name in POSITIONS)):
        return True
    last = value.shape[-1] if value.shape is not None else 1
    length = roles.input_ids.shape[1] if roles.input_ids.shape is not None else None
    if last == 1 or (last != length and exact):
        return False
    return turns(value) or (not exact and last == length and "position" in name)


def _positions(basis: GraphInput) -> GraphInput:
    """`[B, S]`, `[S]`, or `[sections, B, S]` whose sections are alike where all tokens are text."""
    axes = 2 if basis.shape is None else len(basis.shape)
    if axes == 1:
        return replace(basis, role="position_ids", batch_axis=None, token_axis=0)
    if axes == _SECTIONED and basis.shape is not None and isinstance(basis.shape[0], int):
        return replace(basis, role="position_ids", batch_axis=1, token_axis=2)
    return replace(basis, role="position_ids", token_axis=1) if axes == 2 else basis


def _begins_positions(value: ir.Value) -> bool:
    """Whether new tokens are counted on from an integer: a Range starts there, or is added to."""
    single = rank(value) == 0 or (rank(value) == 1 and value.shape is not None
                                  and value.shape[0] == 1)  # fmt: skip
    if value.dtype not in INTEGERS or not single or not _START.search(str(value.name).lower()):
        return False
    return any(
        (is_op(node, "Range") and node.inputs[0] is used)
        or (is_op(node, "Add") and any(_is_range(x) for x in node.inputs if x is not used))
        for used, node in _uses(value)
    )


def _is_range(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and is_op(node, *_SAME):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return is_op(node, "Range")


def _uses(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Nodes that read the value, whatever its shape and type became on the way."""
    for node in value.consumers():
        if is_op(node, *_SAME) and node.inputs[0] is value:
            yield from _uses(node.outputs[0])
        else:
            yield value, node


def _is_of_all_tokens(value: ir.Value, roles: GraphRoles) -> bool:
    """Whether it is as long as attention_mask: the file says so, or its end is cut off first."""
    ids, mask = roles.input_ids.shape, roles.attention_mask.shape
    if value.shape is not None and ids is not None and mask is not None and ids[1] != mask[1]:
        if value.shape[1] == mask[1]:
            return True
        if value.shape[1] == ids[1]:
            return False
    return any(
        is_op(node, "Slice")
        or (is_op(node, "Gather") and any(is_op(x, "Slice") for x in node.outputs[0].consumers()))
        for _, node in _uses(value)
    )


def dtype_name(value: ir.Value) -> str:
    """As NumPy spells it."""
    return "unknown" if value.dtype is None else str(value.dtype.numpy().name)


def shape_of(value: ir.Value) -> Shape | None:
    """Numbers, names, and None for what is left open."""
    if value.shape is None:
        return None
    return tuple(
        size if isinstance(size, int) else (None if size.value is None else str(size.value))
        for size in value.shape
    )
