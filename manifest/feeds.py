"""What a graph is fed in one call, made from its interface table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import Array, IntArray
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.manifest.interface import GraphInput, carried_inputs

_MATRIX: Final = 2


class FeedError(TriangleMixError):
    """An input for which no value can be made from tokens alone."""


@dataclass(frozen=True)
class Call:
    """New tokens and all that came before.

    `ids` `[B, S]`; `mask` `[B, T]`, 1 = a real token, its last `S` columns are those of `ids`;
    `positions` `[B, S]`, counted from the mask where they are not given; `prompt_end` where the
    prompt ends among the `T` slots, None for the row's end; `last_logits_only` where the graph
    lets its callers choose.
    """

    ids: IntArray
    mask: Array
    positions: IntArray | None = None
    prompt_end: int | None = None
    last_logits_only: bool = False

    @property
    def length(self) -> int:
        """`S`."""
        return int(self.ids.shape[1])

    @property
    def past(self) -> int:
        """`T - S`."""
        return int(self.mask.shape[1]) - self.length


def call_feeds(inputs: Iterable[GraphInput], call: Call) -> dict[str, Array]:
    """Every input that a call has to be given, but for caches and states.

    Optional inputs are left out, so that their defaults hold; so is `prompt_length` where the
    call does not say where the prompt ends.

    Raises:
        FeedError: an input that cannot be made from tokens; see `unfed`.
    """
    inputs = tuple(inputs)
    strange = unfed(inputs)
    if strange:
        raise FeedError(why_unfed(strange[0]))
    feeds = {}
    for value in inputs:
        if value.is_fed and not (value.role == "prompt_length" and call.prompt_end is None):
            feeds[value.name] = _MAKERS[value.role](value, call).astype(value.dtype, copy=False)
    return feeds


def empty_carried(inputs: Iterable[GraphInput], batch: int) -> dict[str, Array]:
    """Caches without tokens and states of zeros, as a first call is given them.

    A cache whose length is fixed is zeros of that length: the call's mask must be 0 there.
    """
    return {
        value.name: np.zeros(carried_shape(value, batch), value.dtype)
        for value in carried_inputs(inputs)
    }


def carried_shape(value: GraphInput, batch: int, tokens: int = 0) -> tuple[int, ...]:
    """The shape of a carried input that holds `tokens` tokens (where its length is not fixed).

    Raises:
        FeedError: a size that the file leaves open.
    """
    sizes: list[int] = []
    for axis, size in enumerate(value.shape or ()):
        if isinstance(size, int):
            sizes.append(size)
        elif axis in (value.batch_axis, value.token_axis):
            sizes.append(batch if axis == value.batch_axis else tokens)
        else:
            raise FeedError(f"the file does not say how large axis {axis} of {value.name} is")
    return tuple(sizes)


def carry(
    inputs: Iterable[GraphInput], before: Mapping[str, Array], outputs: Mapping[str, Array]
) -> dict[str, Array]:
    """Caches and states of the next call, from this call's feeds `before` and its `outputs`.

    Raises:
        FeedError: an input that no output carries on.
    """
    carried = {}
    for value in carried_inputs(inputs):
        if value.carried_from is None:
            raise FeedError(why_not_carried(value))
        carried[value.name] = carried_value(value, before, outputs[value.carried_from])
    return carried


def carried_value(value: GraphInput, before: Mapping[str, Array], output: Array) -> Array:
    """One of them: the output in the input's axes and type, behind what there was if it appends."""
    if value.permutation is not None:
        output = np.transpose(output, value.permutation)
    if value.appends:
        assert value.token_axis is not None
        output = np.concatenate([before[value.name], output], axis=value.token_axis)
    return output.astype(value.dtype, copy=False)


def unfed(inputs: Iterable[GraphInput]) -> list[GraphInput]:
    """The inputs for which `call_feeds` can make no value."""
    return [
        value
        for value in inputs
        if not value.is_fed and not value.is_carried and value.role != "optional"
    ]


def why_unfed(value: GraphInput) -> str:
    """Why there is no value for an input of `unfed`, in a clause."""
    shape = "" if value.shape is None else f" {_shape_text(value)}"
    if value.role == "inputs_embeds":
        return f"its input {value.name}{shape} wants embeddings, not tokens"
    if value.role == "score_mask":
        return f"its input {value.name}{shape} wants a mask for each row and key, not one of tokens"
    return f"nothing says what its input {value.name}{shape} {value.dtype} is to be given"


def why_not_carried(value: GraphInput) -> str:
    """What a cache or state without an output of its own means, in a clause."""
    return f"no output of the graph carries its input {value.name} on to the next call"


def _shape_text(value: GraphInput) -> str:
    return "[" + ",".join("?" if size is None else str(size) for size in value.shape or ()) + "]"


def _positions(value: GraphInput, call: Call) -> Array:
    """`[B, S]`, `[S]` of the first row, or the same for every section of `[sections, B, S]`."""
    positions = call.positions
    if positions is None:
        counted = np.cumsum(np.asarray(call.mask, np.int64), axis=1) - 1
        positions = np.maximum(counted, 0)[:, call.past :]
    rank = _MATRIX if value.shape is None else len(value.shape)
    if rank < _MATRIX:
        return np.asarray(positions[0])
    if rank == _MATRIX:
        return positions
    assert value.shape is not None
    return np.broadcast_to(positions, (int(str(value.shape[0])), *positions.shape))


def _slots(value: GraphInput, call: Call) -> Array:
    slots = np.arange(call.past, call.past + call.length)
    return slots if value.batch_axis is None else np.tile(slots, (len(call.ids), 1))


def _prompt_end(value: GraphInput, call: Call) -> Array:
    assert call.prompt_end is not None
    return np.full(len(call.ids), call.prompt_end)


def _filled(value: GraphInput, number: int, call: Call) -> Array:
    """A scalar, or `number` at every place of the declared shape; open sizes are the batch's."""
    sizes = [
        size if isinstance(size, int) else len(call.ids if axis == value.batch_axis else (1,))
        for axis, size in enumerate(value.shape or ())
    ]
    return np.full(sizes, number)


_MAKERS: Final[dict[str, Callable[[GraphInput, Call], Array]]] = {
    "input_ids": lambda value, call: call.ids,
    "attention_mask": lambda value, call: call.mask,
    "position_ids": _positions,
    "token_type_ids": lambda value, call: np.zeros(call.ids.shape),
    "all_token_type_ids": lambda value, call: np.zeros(call.mask.shape),
    "cache_position": _slots,
    # 0 keeps every row's, as transformers means it
    "num_logits_to_keep": lambda value, call: _filled(value, int(call.last_logits_only), call),
    "prompt_length": _prompt_end,
    "seqlens_k": lambda value, call: _filled(value, call.past + call.length - 1, call),
    "total_length": lambda value, call: _filled(value, call.past + call.length, call),
    "past_length": lambda value, call: _filled(value, call.past, call),
    "beam_idx": lambda value, call: np.arange(len(call.ids)),
    "use_cache_branch": lambda value, call: _filled(value, call.past > 0, call),
}
