"""The pattern in a transformers model: `patch(model, config)` and `attn_implementation=`.

transformers calls `_attention` in place of its own attention, with the queries and keys of after
RoPE and norms, and `row_mask` in place of its mask builder, so that no 4-D mask is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Final

from torch import Tensor, nn
from trianglemix.custom_ops.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.pytorch.backends import triangle_attention
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.config import TriangleMixConfig
from trianglemix.pytorch.layout import Rows, prompt_length, rows_of_padding

IMPLEMENTATION: Final = "trianglemix"
"""Name for `from_pretrained(..., attn_implementation=...)`, once `register()` was called."""
_CONFIG_KEY: Final = "trianglemix"
_NO_LAST_ROW: Final = 2**40
_REFUSED: Final = ("s_aux", "position_bias", "cache")
"""Arguments that change what attention means, and that the pattern does not know."""


class UnsupportedModelError(TriangleMixError):
    """The model's attention is not one this package can replace."""


def patch(model: nn.Module, config: TriangleMixConfig) -> nn.Module:
    """Makes the configuration's layers of a transformers model triangle layers, in place.

    Afterwards a prefill drops the Middle section in those layers, decode steps are dense, and every
    layer runs in O(N) memory. `model.generate` works as before, with `prefill_chunk_size` too.
    Chunks fed by hand need `prompt_length(...)` around them. The choice is kept in
    `model.config.trianglemix`, so a saved model can be loaded again with
    `attn_implementation="trianglemix"`. Returns the model.

    Raises:
        ConfigurationError: the configuration names no layers, or layers the model has not.
        UnsupportedModelError: a triangle layer is no plain causal attention.
    """
    register()
    text = _text_config(model)
    layers = config.triangle_layers(text.num_hidden_layers)
    _check_layers(text, layers)
    previous = text._attn_implementation
    settings = {**config.pattern.as_attributes(), "triangle_layers": list(layers)}
    if previous != IMPLEMENTATION:
        settings["previous_implementation"] = previous
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        model.generate = _with_prompt_length(model.generate)  # type: ignore[assignment, arg-type]
    else:
        settings["previous_implementation"] = _settings(text).get("previous_implementation")
    setattr(text, _CONFIG_KEY, settings)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives a patched model its own attention back. Returns the model."""
    text = _text_config(model)
    previous = _settings(text).get("previous_implementation") or "sdpa"
    model.set_attn_implementation(previous)  # type: ignore[operator]
    delattr(text, _CONFIG_KEY)
    model.__dict__.pop("generate", None)
    return model


def register() -> None:
    """Makes `attn_implementation="trianglemix"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, row_mask)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _settings(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] | None = getattr(config, _CONFIG_KEY, None)
    if settings is None:
        raise UnsupportedModelError(
            'attn_implementation is "trianglemix", but the model\'s config names no triangle '
            "layers; call trianglemix.pytorch.patch(model, config)"
        )
    return settings


def _check_layers(text: Any, layers: tuple[int, ...]) -> None:
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    for layer in layers:
        if kinds[layer] != "full_attention":
            raise UnsupportedModelError(
                f"layer {layer} is a {kinds[layer]} layer, but only full_attention layers can be "
                "triangle layers; leave it out"
            )
    strange = sorted(set(kinds) & {"chunked_attention"})
    if strange:
        raise UnsupportedModelError(f"the model has {strange[0]} layers, which are not supported")


def _with_prompt_length(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` knows where the prompt ends, which a chunk of it cannot know."""

    @wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")  # longer than the ids when a cache is continued
        lengths = [x.shape[1] for x in (ids, mask) if isinstance(x, Tensor)]
        if not lengths:
            return generate(*args, **kwargs)
        with prompt_length(max(lengths)):
            return generate(*args, **kwargs)

    return wrapper


def row_mask(
    batch_size: int, kv_length: int, mask_function: Callable[..., Any], **given: Any
) -> Rows:
    """transformers' mask interface: hands the layers a `Rows` in place of a 4-D mask."""
    _check_mask_function(mask_function)
    if given.get("q_length") is not None:
        start, length = int(given.get("q_offset", 0)), int(given["q_length"])
    else:  # transformers 4.57
        position = given["cache_position"]
        start, length = int(position[0]), int(position.shape[0])
    padding = given.get("attention_mask")
    if isinstance(padding, Rows):  # made ahead by `generate`, for a preallocated cache
        return padding
    return rows_of_padding(padding, batch_size, start, start + length)


def _check_mask_function(mask_function: Callable[..., Any]) -> None:
    """Refuses masks that are more than causal and sliding (packed sequences, prefix blocks)."""
    parts = [mask_function]
    if mask_function.__qualname__ == "and_masks.<locals>.and_mask":
        parts = list((mask_function.__closure__ or ())[0].cell_contents)
    known = ("causal_mask_function", "sliding_window_overlay.<locals>.inner_mask")
    for part in parts:
        if part.__qualname__ not in known:
            raise UnsupportedModelError(
                f"the model asks for the mask {part.__qualname__}, but the pattern is defined for "
                "plain causal attention only; use another attn_implementation for this input"
            )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rows | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[B, H, S, D]`, `[B, G, T, D]` -> `[B, S, H, Dv]`."""
    _check_call(module, attention_mask, dropout, given)
    S, T = query.shape[2], key.shape[2]
    rows = attention_mask or Rows(T - S, (0,) * query.shape[0], (T,) * query.shape[0])
    end = rows.start + S
    if end < T:  # a preallocated cache
        key, value = key[:, :, :end], value[:, :, :end]
    elif end > T:  # a sliding cache has let its oldest slots go
        rows = rows.shifted(end - T)
    pattern, rows = _layer_pattern(module, given.get("sliding_window"), rows)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    attention = Attention(pattern, scale, given.get("softcap") or 0.0)
    output = triangle_attention(query, key, value, rows, attention)
    return output.transpose(1, 2).contiguous(), None


def _check_call(module: Any, rows: Any, dropout: float, given: dict[str, Any]) -> None:
    if rows is not None and not isinstance(rows, Rows):
        raise UnsupportedModelError(
            "the model was given a ready-made 4-D mask; pass a 2-D padding mask instead"
        )
    causal = given.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedModelError(f"{type(module).__name__} is not causal attention")
    strange = [name for name in _REFUSED if given.get(name) is not None]
    if strange or dropout:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for {strange[0] if strange else 'dropout'}, which the "
            "pattern does not know; put the model into eval mode or use another attention"
        )


def _layer_pattern(module: Any, window: int | None, rows: Rows) -> tuple[TrianglePattern, Rows]:
    """The layer's own pattern; a sliding layer is a triangle without sinks and last rows."""
    settings = _settings(module.config)
    triangle = module.layer_idx in settings["triangle_layers"]
    if not window:
        return (_pattern_of(_frozen(settings)) if triangle else DENSE_PATTERN), rows
    if triangle:
        raise UnsupportedModelError(
            f"layer {module.layer_idx} already has a sliding window of {window} tokens; leave it "
            "out of the triangle layers"
        )
    endless = tuple(_NO_LAST_ROW for _ in rows.prompt_length)
    return TrianglePattern(0, int(window), 1), Rows(rows.start, rows.first_valid, endless)


def _frozen(settings: dict[str, Any]) -> tuple[int, int, int]:
    return (
        settings["num_sink_tokens"],
        settings["sliding_window_size"],
        settings["num_last_tokens"],
    )


@lru_cache(maxsize=8)
def _pattern_of(numbers: tuple[int, int, int]) -> TrianglePattern:
    return TrianglePattern(*numbers)
