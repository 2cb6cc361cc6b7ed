"""One small call of a model, to see whether and how its layers call transformers' attention.

A model that computes its attention by itself runs on unchanged under any `attn_implementation`.
So before layers are replaced, the model is called once with two short rows, one of them padded on
the left. Each attention call of it runs twice: by the code of the model's own file (the "eager"
form, which says what the model means) and by ours in its dense form; the two must agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN
from trianglemix.hf.attention_arguments import uses_alibi
from trianglemix.pytorch.attention_call import (
    UnsupportedModelError,
    check_call,
    row_mask,
    sliding,
)
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.layout import Rows

_IMPLEMENTATION: Final = "trianglemix_dry_call"
_TOKENS: Final = 24
_PADS: Final = (0, 5)
_TOLERANCE: Final = 1e-3
_ROUTE: Final = "export its ONNX file with trianglemix-export instead"


def check_attention(model: nn.Module, layers: Sequence[int]) -> dict[int, int]:
    """Holds after it: each of `layers` is one causal attention that transformers lets us replace.

    Returns the sliding windows of those layers that have one.

    Raises:
        UnsupportedModelError: a layer never calls the interface, its attention is another one, or
            the model has no weights yet.
    """
    name = type(model).__name__
    any_model: Any = model
    if getattr(any_model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model, but the pattern is defined for decoders whose "
            "prompt goes through causal attention"
        )
    _refuse_without_data(model)
    calls = _observe(model)
    count = int(text_config(model).num_hidden_layers)
    if calls.modules and max(calls.modules) >= count:
        raise UnsupportedModelError(
            f"{name} numbers its attention up to {max(calls.modules)}, but its configuration "
            f"counts {count} layers, so its layers cannot be chosen by number; {_ROUTE}"
        )
    missing = [layer for layer in layers if layer not in calls.modules]
    if missing and uses_alibi(any_model.config):
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface: its attention is code of its "
            "own, with a bias by position (ALiBi), which the pattern does not know"
        )
    if missing:
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface in "
            f"{_named(missing)}: it is code of its own, or no attention, so nothing would change "
            f"there; {'leave it out, or ' if calls.modules else ''}{_ROUTE}"
        )
    for layer in layers:
        modules = calls.modules[layer]
        if len(modules) > 1:
            kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
            raise UnsupportedModelError(
                f"{name} has {len(modules)} attention modules numbered {layer} ({kinds}), so the "
                f"layer is not known by its number; {_ROUTE}"
            )
    return {layer: calls.windows[layer] for layer in layers if layer in calls.windows}


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model; of a model with other parts, only its own.

    Raises:
        UnsupportedModelError: the module is no model of transformers.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no configuration of transformers; give the transformers "
            "model inside it"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def use_attention(model: nn.Module, implementation: str) -> None:
    """Sets the attention of the language model; a vision or audio part keeps its own."""
    any_model: Any = model
    text, config = text_config(model), any_model.config
    parts = getattr(config, "sub_configs", {})
    own = [part for part in parts if getattr(config, part, None) is text]
    any_model.set_attn_implementation({own[0]: implementation} if own else implementation)


@dataclass(frozen=True)
class _Mask:
    """What a model holds for its mask during the call: ours, and the one of its own attention."""

    rows: Rows
    eager: Tensor | None

    ndim: ClassVar[int] = 0

    def contiguous(self) -> _Mask:
        """Itself."""
        return self


@dataclass
class _Calls:
    """The attention modules that were entered and the windows of their masks, by layer."""

    modules: dict[int, list[nn.Module]] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **given: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface."""
        mask = attention_mask
        rows = mask.rows if isinstance(mask, _Mask) else mask
        others = {name: x for name, x in given.items() if name != "dropout"}
        rows = check_call(module, rows, given.get("dropout") or 0.0, others)
        if rows.window:
            self.windows[int(module.layer_idx)] = rows.window
        modules = self.modules.setdefault(int(module.layer_idx), [])
        if not any(module is known for known in modules):
            modules.append(module)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        q, k, v = (_precise(x) for x in (query, key, value))
        ours = _dense(q, k, v, rows, given)
        if own is not None:
            eager = None if mask.eager is None else _precise(mask.eager)
            _refuse_difference(module, ours, own(module, q, k, v, eager, **given)[0], rows)
        return ours.to(query.dtype), None


def _refuse_without_data(model: nn.Module) -> None:
    """Weights on the meta device have none, unless accelerate brings them along in each call."""
    empty = next((name for name, x in model.named_parameters() if x.is_meta), None)
    if empty is not None and getattr(model, "hf_device_map", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights yet ({empty} is on the meta device), so its "
            "attention cannot be looked at; load them first (from_pretrained, or load_state_dict "
            "with assign=True), then patch"
        )


def _observe(model: nn.Module) -> _Calls:
    calls = _Calls()
    any_model: Any = model
    embed = any_model.get_input_embeddings()
    weight = embed.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    B = len(_PADS)
    ids = torch.arange(B * _TOKENS, device=device).reshape(B, _TOKENS)
    ids = 3 + ids * 7 % max(1, weight.shape[0] - 3)
    mask = torch.arange(_TOKENS, device=device)[None] >= ids.new_tensor(_PADS)[:, None]
    with _calling(model, calls.attend), torch.no_grad():
        try:
            any_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
            raise _not_callable(model, error) from error
        except (NotImplementedError, TypeError, ValueError) as error:
            raise _not_callable(model, error) from error
    return calls


def _not_callable(model: nn.Module, error: Exception) -> UnsupportedModelError:
    first_line = (str(error).strip().splitlines() or [""])[0]
    if _Mask.__name__ in first_line:
        return UnsupportedModelError(
            f"{type(model).__name__} computes with its attention mask, so it makes a mask of its "
            "own, which the pattern does not know"
        )
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be called with input_ids and attention_mask under another "
        f"attention function ({type(error).__name__}: {first_line}), so its attention cannot be "
        "replaced"
    )


@contextmanager
def _calling(model: nn.Module, attend: Callable[..., Any]) -> Iterator[None]:
    """The model in eval mode with `attend` for its attention; both are put back afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def mask(*arguments: Any, **given: Any) -> _Mask:
        return _Mask(row_mask(*arguments, **given), ALL_MASK_ATTENTION_FUNCTIONS["eager"](**given))

    AttentionInterface.register(_IMPLEMENTATION, attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, mask)
    previous = text_config(model)._attn_implementation
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        use_attention(model, _IMPLEMENTATION)
        yield
    finally:
        use_attention(model, previous)
        for module, flag in training:
            module.training = flag
        AttentionInterface.register(_IMPLEMENTATION, _closed)


def _closed(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise AssertionError("attention of a dry call runs inside the call only")


def _precise(x: Tensor) -> Tensor:
    """At least float32: in half precision eager attention rounds its scores, ours does not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dense(query: Tensor, key: Tensor, value: Tensor, rows: Rows, given: dict[str, Any]) -> Tensor:
    """Causal attention as the patched model computes it: `[B, S, H, Dv]`."""
    scale = given.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    attention = Attention(DENSE_PATTERN, scale, given.get("softcap") or 0.0)
    if rows.window:
        pattern, rows = sliding(rows, rows.window)
        attention = Attention(pattern, scale, attention.softcap)
    return block_attention(query, key, value, rows, attention).transpose(1, 2).contiguous()


def _refuse_difference(module: Any, ours: Tensor, theirs: Tensor, rows: Rows) -> None:
    if ours.shape != theirs.shape:
        theirs = theirs.reshape(ours.shape)
    first = torch.tensor(rows.first_valid, device=ours.device)
    real = torch.arange(ours.shape[1], device=ours.device)[None] >= first[:, None]
    ours, theirs = ours[real].float(), theirs[real].float()  # pads may hold anything, even NaN
    worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
    if not worst <= _TOLERANCE:
        raise UnsupportedModelError(
            f"{type(module).__name__} (layer {module.layer_idx}) computes attention of another "
            f"kind: causal attention on its queries and keys is off by {worst:.1e} of the largest "
            "value; this model's layers cannot be triangle layers"
        )


def _named(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {list(layers)}"
