"""A graph's interface as one typed table: what each input and output is for, its type and shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from trianglemix.custom_ops.strict import STRICT

Size = int | str | None
"""A dimension: fixed, named, or left open."""
Shape = tuple[Size, ...]

InputRole = Literal[
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key",
    "past_value",
    "past",
    "state",
    "prompt_length",
    "token_type_ids",
    "all_token_type_ids",
    "cache_position",
    "num_logits_to_keep",
    "seqlens_k",
    "total_length",
    "past_length",
    "beam_idx",
    "use_cache_branch",
    "inputs_embeds",
    "score_mask",
    "optional",
    "unknown",
]
"""What an input is for.

`past_key` and `past_value` belong to a layer and grow by the call's tokens along `token_axis`;
`past` grows likewise, but holds no single layer's keys or values; a `state` keeps its shape. These
four are carried: one call's output is the next call's input. `seqlens_k` is each row's last key,
`total_length` and `past_length` count tokens with and before the call, `all_token_type_ids` are
those of both. `beam_idx` says which row goes on as which: each as itself. A `score_mask` hides keys
for each row by itself, as only the graph's users know. `optional` has a default, which is used.
`unknown` is anything else, which only the graph's own users can feed.
"""
OutputRole = Literal[
    "logits", "present_key", "present_value", "present", "state", "hidden_states", "other"
]
CARRIED: Final[tuple[InputRole, ...]] = ("past_key", "past_value", "past", "state")
_OF_TOKENS: Final[tuple[InputRole, ...]] = (
    "input_ids",
    "position_ids",
    "cache_position",
    "token_type_ids",
)
UNFED: Final[tuple[InputRole, ...]] = ("inputs_embeds", "score_mask", "unknown")


@dataclass(frozen=True)
class GraphInput:
    """One input. `dtype` as NumPy spells it, or "bfloat16"; `shape` None where it is not declared.

    Of a carried input `carried_from` is the output that the next call is given, `appends` says
    that this output holds the call's new tokens alone, to be put behind what there was, and
    `permutation` is the order in which the output's axes are the input's (None: as they are).
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    role: InputRole
    dtype: str
    shape: Shape | None
    layer: int | None = None
    batch_axis: int | None = 0
    token_axis: int | None = None
    carried_from: str | None = None
    appends: bool = False
    permutation: tuple[int, ...] | None = None

    @property
    def is_carried(self) -> bool:
        """Whether its value comes from the call before."""
        return self.role in CARRIED

    @property
    def is_fed(self) -> bool:
        """Whether a call has to give it a value (carried ones not counted) and can make one."""
        return not self.is_carried and self.role not in ("optional", *UNFED)


@dataclass(frozen=True)
class GraphOutput:
    """One output; `dtype` and `shape` as in `GraphInput`."""

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    role: OutputRole
    dtype: str
    shape: Shape | None
    layer: int | None = None


def with_role(inputs: Iterable[GraphInput], *roles: InputRole) -> tuple[GraphInput, ...]:
    """The inputs of these roles, in the graph's order."""
    return tuple(value for value in inputs if value.role in roles)


def carried_inputs(inputs: Iterable[GraphInput]) -> tuple[GraphInput, ...]:
    """Caches and states, in the graph's order."""
    return with_role(inputs, *CARRIED)


def has_cache(inputs: Iterable[GraphInput]) -> bool:
    """Whether keys and values of earlier tokens come from call to call."""
    return bool(with_role(inputs, "past_key", "past_value", "past"))


def changed_on_the_way(
    inputs: Iterable[GraphInput], outputs: Iterable[GraphOutput]
) -> dict[str, bool]:
    """For each carried input whether it is something else than the output it comes from."""
    types = {output.name: output.dtype for output in outputs}
    return {
        value.name: value.permutation is not None
        or value.appends
        or types.get(value.carried_from or "") != value.dtype
        for value in carried_inputs(inputs)
    }


def fixed_batch(inputs: Iterable[GraphInput]) -> int | None:
    """The number of rows that the graph is made for; None where any will do."""
    for value in inputs:
        size = None if value.batch_axis is None else _size(value, value.batch_axis)
        if isinstance(size, int):
            return size
    return None


def fixed_length(inputs: Iterable[GraphInput]) -> int | None:
    """The number of new tokens that every call must have; None where any will do."""
    for value in with_role(inputs, *_OF_TOKENS):
        size = None if value.token_axis is None else _size(value, value.token_axis)
        if isinstance(size, int):
            return size
    return None


def fixed_past(inputs: Iterable[GraphInput]) -> int | None:
    """The number of slots that every past must have; None where any will do."""
    for value in carried_inputs(inputs):
        size = None if value.token_axis is None else _size(value, value.token_axis)
        if isinstance(size, int):
            return size
    return None


def fixed_total(inputs: Iterable[GraphInput]) -> int | None:
    """The length that every attention mask must have; None where any will do."""
    for value in with_role(inputs, "attention_mask", "all_token_type_ids"):
        size = _size(value, -1)
        if isinstance(size, int):
            return size
    return None


def _size(value: GraphInput, axis: int) -> Size:
    if not value.shape or axis >= len(value.shape):
        return None
    return value.shape[axis]
