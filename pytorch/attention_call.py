"""What a transformers model hands to its attention function, read or refused.

transformers asks `row_mask` for a mask and hands the answer, with the queries and keys of after
RoPE and norms, to the attention function. Whatever the pattern does not know is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from torch import Tensor
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.hf.attention_arguments import describe_arguments, unknown_arguments
from trianglemix.pytorch.layout import Rows, rows_of_padding

_NO_LAST_ROW: Final = 2**40
_UNDERSTOOD: Final = frozenset({"scaling", "softcap", "sliding_window"})
_KNOWN_MASKS: Final = ("causal_mask_function", "sliding_window_overlay.<locals>.inner_mask")
_MASK_NAMES: Final = {
    "chunked_overlay": "chunked attention (every row sees its own chunk only)",
    "bidirectional_mask_function": "attention that is not causal",
    "packed_sequence_mask_function": "attention within packed sequences",
    "or_masks": "attention that is not causal between some tokens",
    "blockwise_overlay": "attention that is not causal inside blocks of tokens",
}


class UnsupportedModelError(TriangleMixError):
    """The model's attention is not one this package can replace."""


def row_mask(
    batch_size: int, kv_length: int, mask_function: Callable[..., Any], **given: Any
) -> Rows:
    """transformers' mask interface: hands the layers a `Rows` in place of a 4-D mask.

    A mask that is more than causal and a sliding window is refused where it is used: decoders make
    one for an encoder that is not there.
    """
    window = given.get("local_size")
    window = None if window is None else int(window)
    if given.get("q_length") is not None:
        start, length = int(given.get("q_offset", 0)), int(given["q_length"])
    else:  # transformers 4.57
        position = given["cache_position"]
        start, length = int(position[0]), int(position.shape[0])
    padding = given.get("attention_mask")
    if isinstance(padding, Rows):  # made ahead by `generate`, for a preallocated cache
        rows = padding
    else:
        rows = rows_of_padding(padding, batch_size, start, start + length)
    return replace(rows, window=window, unknown=_unknown_mask(mask_function))


def check_call(module: Any, mask: Any, dropout: float, given: dict[str, Any]) -> Rows:
    """The rows of one attention call whose meaning is known.

    Raises:
        UnsupportedModelError: the call names no layer, brings no mask or one of its own, or an
            argument that the pattern does not know.
    """
    name = type(module).__name__
    if getattr(module, "layer_idx", None) is None:
        raise UnsupportedModelError(f"{name} calls its attention without the layer's number")
    causal = given.get("is_causal")
    if mask is None and not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedModelError(f"{name} is not causal attention")
    if mask is None:
        raise UnsupportedModelError(
            f"{name} calls its attention without a mask of transformers' mask interface, so "
            "neither padding nor the kind of its mask can be known"
        )
    if not isinstance(mask, Rows):
        raise UnsupportedModelError(
            f"{name} was given a ready-made 4-D mask; where it is the model's own (a bias such as "
            "ALiBi, chunks, blocks) the pattern does not know it, else pass a 2-D padding mask"
        )
    if mask.unknown is not None:
        raise UnsupportedModelError(
            f"{name} asks for the mask {mask.unknown}, but the pattern is defined for plain causal "
            "attention only; use another attn_implementation for this input"
        )
    strange = unknown_arguments(given, _UNDERSTOOD)
    if strange:
        raise UnsupportedModelError(
            f"{name} hands {describe_arguments(strange)} to its attention, which "
            "the pattern does not know"
        )
    if dropout:
        raise UnsupportedModelError(f"{name} asks for dropout; put the model into eval mode")
    return mask


def rows_in_buffer(
    rows: Rows, key: Tensor, value: Tensor, length: int
) -> tuple[Rows, Tensor, Tensor]:
    """The rows, and the keys and values `[B, G, T, D]` that they may see."""
    end, total = rows.start + length, key.shape[2]
    if end < total:  # a preallocated cache
        return rows, key[:, :, :end], value[:, :, :end]
    if end > total:  # a sliding cache has let its oldest slots go
        return rows.shifted(end - total), key, value
    return rows, key, value


def sliding(rows: Rows, window: int) -> tuple[TrianglePattern, Rows]:
    """A layer that slides a window of its own: a triangle without sinks and last rows."""
    endless = tuple(_NO_LAST_ROW for _ in rows.prompt_length)
    return TrianglePattern(0, window, 1), replace(rows, prompt_length=endless)


def _unknown_mask(mask_function: Callable[..., Any]) -> str | None:
    """The name of a mask that is more than causal and sliding (packed sequences, blocks)."""
    for part in _conjuncts(mask_function):
        name = part.__qualname__
        if name in _KNOWN_MASKS or _is_one_sequence(part):
            continue
        kind = _MASK_NAMES.get(name.split(".")[0])
        return f"{name}, {kind}" if kind else name
    return None


def _conjuncts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that must all agree, nested ones included."""
    if mask_function.__qualname__ != "and_masks.<locals>.and_mask":
        yield mask_function
        return
    for part in (mask_function.__closure__ or ())[0].cell_contents:
        yield from _conjuncts(part)


def _is_one_sequence(part: Callable[..., Any]) -> bool:
    """transformers 4.57 asks for packed sequences without a cache, even where each row is one."""
    if not part.__qualname__.startswith("packed_sequence_mask_function"):
        return False
    cells = [cell.cell_contents for cell in part.__closure__ or ()]
    indices = [x for x in cells if isinstance(x, Tensor)]
    return bool(indices) and all(bool((x == x[:, :1]).all()) for x in indices)
