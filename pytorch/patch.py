"""Pattern and rule in a transformers model: `patch(model, config)` and `attn_implementation=`.

transformers calls `_attention` in place of its own attention, with the queries and keys of after
RoPE and norms, and `row_mask` in place of its mask builder, so that no 4-D mask is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any, Final

from torch import Tensor, nn
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.pytorch.attention_call import (
    UnsupportedModelError,
    check_call,
    row_mask,
    rows_in_buffer,
    sliding,
)
from trianglemix.pytorch.backends import triangle_attention
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.pytorch.block_sparse import block_sparse_attention
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.config import TriangleMixConfig
from trianglemix.pytorch.dry_call import check_attention, text_config, use_attention
from trianglemix.pytorch.layout import Rows, prompt_length

IMPLEMENTATION: Final = "trianglemix"
"""Name for `from_pretrained(..., attn_implementation=...)`, once `register()` was called."""
_CONFIG_KEY: Final = "trianglemix"


def patch(model: nn.Module, config: TriangleMixConfig) -> nn.Module:
    """Makes layers of a transformers model triangle or block-sparse layers, in place.

    Afterwards a prefill drops the Middle section in the triangle layers and the blocks of little
    mass in the block-sparse ones, decode steps are dense, and every layer runs in O(N) memory.
    `model.generate` works as before, with `prefill_chunk_size` too. Chunks fed by hand need
    `prompt_length(...)` around them; of a tile of 128 tokens that a chunk cuts, a block-sparse
    layer drops nothing. The choice is kept in `model.config.trianglemix`, so a saved model can be
    loaded again with `attn_implementation="trianglemix"`; without it, it is the dense model. A
    pickled model stays patched. Returns the model.

    Raises:
        ConfigurationError: the configuration names no layers, or layers the model has not.
        UnsupportedModelError: one of the layers is no plain causal attention.
    """
    register()
    text = text_config(model)
    triangles = config.triangle_layers(text.num_hidden_layers)
    sparse = config.block_sparse_layers(text.num_hidden_layers)
    layers = (*triangles, *sparse)
    _check_layers(type(model).__name__, text, layers)
    _refuse_windows(type(model).__name__, check_attention(model, layers))
    previous = text._attn_implementation
    settings = {**config.pattern.as_attributes(), "triangle_layers": list(triangles)}
    if sparse:
        settings["block_sparse_layers"] = list(sparse)
        settings["block_rule"] = config.block_rule.as_attributes()
    if previous != IMPLEMENTATION:
        settings["previous_implementation"] = previous
        use_attention(model, IMPLEMENTATION)
        if hasattr(model, "generate"):  # a model without a head has none
            model.generate = _Generate(model.generate)  # type: ignore[assignment, arg-type]
    else:
        settings["previous_implementation"] = _settings(text).get("previous_implementation")
    setattr(text, _CONFIG_KEY, settings)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives a patched model its own attention back. Returns the model."""
    text = text_config(model)
    previous = _settings(text).get("previous_implementation") or "sdpa"
    use_attention(model, previous)
    delattr(text, _CONFIG_KEY)
    model.__dict__.pop("generate", None)
    return model


def register() -> None:
    """Makes `attn_implementation="trianglemix"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, row_mask)


def _settings(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] | None = getattr(config, _CONFIG_KEY, None)
    if settings is None:
        raise UnsupportedModelError(
            'attn_implementation is "trianglemix", but the model\'s config names no triangle '
            "layers; call trianglemix.pytorch.patch(model, config)"
        )
    return settings


def _check_layers(name: str, text: Any, layers: tuple[int, ...]) -> None:
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    for layer in layers:
        if kinds[layer] != "full_attention":
            raise UnsupportedModelError(
                f"layer {layer} of {name} is {kinds[layer]}, but only full_attention layers can be "
                "triangle or block-sparse layers; leave it out"
            )
    strange = sorted(set(kinds) & {"chunked_attention"})
    if strange:
        raise UnsupportedModelError(
            f"{name} has {strange[0]} layers, in which every row sees its own chunk only; the "
            "pattern does not know that mask, so no layer of this model can be a triangle layer"
        )


class _Generate:
    """`generate` that knows where the prompt ends, which a chunk of it cannot know.

    An object, no closure: in a copy of the model it holds the copy's own `generate`. What
    `update_wrapper` puts there cannot be pickled, so it is made again in a model that was.
    """

    def __init__(self, generate: Callable[..., Any]) -> None:
        self._generate = generate
        update_wrapper(self, generate)

    def __getstate__(self) -> dict[str, Any]:
        return {"generate": self._generate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # the process that loads a model may not know its attention yet
        self.__init__(state["generate"])  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` itself, with the prompt's length."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")  # longer than the ids when a cache is continued
        lengths = [x.shape[1] for x in (ids, mask) if isinstance(x, Tensor)]
        if not lengths:
            return self._generate(*args, **kwargs)
        with prompt_length(max(lengths)):
            return self._generate(*args, **kwargs)


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
    rows = check_call(module, attention_mask, dropout, given)
    rows, key, value = rows_in_buffer(rows, key, value, query.shape[2])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    softcap = given.get("softcap") or 0.0
    rule = _layer_rule(module, rows)
    if rule is not None:
        sparse = BlockSparse(rule, scale, softcap)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        output = block_sparse_attention(query, key, value, rows, sparse, layer)
    else:
        pattern, rows = _layer_pattern(module, rows)
        attention = Attention(pattern, scale, softcap)
        output = triangle_attention(query, key, value, rows, attention)
    return output.transpose(1, 2).contiguous(), None


def _layer_rule(module: Any, rows: Rows) -> BlockRule | None:
    """The rule, where the layer is block-sparse."""
    settings = _settings(module.config)
    if module.layer_idx not in settings.get("block_sparse_layers", ()):
        return None
    if rows.window:
        _refuse_windows(type(module).__name__, {module.layer_idx: rows.window})
    return _rule_of(tuple(settings["block_rule"].items()))


def _layer_pattern(module: Any, rows: Rows) -> tuple[TrianglePattern, Rows]:
    """The layer's own pattern; a sliding layer is a triangle without sinks and last rows."""
    settings = _settings(module.config)
    triangle = module.layer_idx in settings["triangle_layers"]
    window = rows.window
    if not window:
        return (_pattern_of(_frozen(settings)) if triangle else DENSE_PATTERN), rows
    if triangle:
        _refuse_windows(type(module).__name__, {module.layer_idx: window})
    return sliding(rows, window)


def _refuse_windows(name: str, windows: dict[int, int]) -> None:
    for layer, window in windows.items():
        raise UnsupportedModelError(
            f"layer {layer} of {name} already has a sliding window of {window} tokens; leave it "
            "out of the layers to replace"
        )


def _frozen(settings: dict[str, Any]) -> tuple[int, int, int]:
    return (
        settings["num_sink_tokens"],
        settings["sliding_window_size"],
        settings["num_last_tokens"],
    )


@lru_cache(maxsize=8)
def _pattern_of(numbers: tuple[int, int, int]) -> TrianglePattern:
    return TrianglePattern(*numbers)


@lru_cache(maxsize=8)
def _rule_of(values: tuple[tuple[str, Any], ...]) -> BlockRule:
    return BlockRule(**dict(values))
