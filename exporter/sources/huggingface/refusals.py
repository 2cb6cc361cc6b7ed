"""Why a transformers model cannot be exported, in words that name the cause and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from trianglemix.exporter.errors import RefusedError
from trianglemix.hf.attention_arguments import uses_alibi

ONNX_ROUTE: Final = (
    "make its ONNX file with another exporter (for example optimum) and give that file"
)
"""What to do where this route ends but an ONNX file may not."""
_EXPERTS_ROUTE: Final = (
    "make its ONNX file with transformers' OnnxExporter or mobius, which can, and give that file"
)
_ATTENTION_KINDS: Final = ("full_attention", "sliding_attention", "chunked_attention")
_MOVING_ROPE: Final = ("dynamic", "longrope", "su")
"""RoPE whose frequencies depend on the prompt's length: a graph would freeze one of them."""


def refuse_moving_rope(kinds: Iterator[str]) -> None:
    """Raises RefusedError where a rotary embedding's frequencies move with the length."""
    for kind in kinds:
        if kind in _MOVING_ROPE or "dynamic" in kind:
            raise RefusedError(
                f"the model's rotary embedding is of type {kind!r}, whose frequencies depend on "
                "the prompt's length, which a graph cannot follow; choose a fixed type (for "
                "example yarn or linear) in config.json if the model allows it"
            )


def rope_types_of_model(model: Any) -> Iterator[str]:
    """What the loaded rotary embeddings are, defaults of the model's class included."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        for name in kind.values() if isinstance(kind, dict) else [kind]:
            if isinstance(name, str):
                yield name


def refuse_other_layers(model: Any) -> None:
    """Raises RefusedError where the configuration names layers that are no attention."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise RefusedError(
            f"{type(model).__name__} is an encoder-decoder model; only decoders, whose prompt goes "
            "through causal attention, can be exported"
        )
    kinds = list(getattr(config, "layer_types", None) or ())
    for kind in dict.fromkeys(kinds):
        if kind in _ATTENTION_KINDS:
            continue
        layers = [layer for layer, other in enumerate(kinds) if other == kind]
        keeps = "picks its keys by an index of its own" if "index" in kind else (
            "keeps a state of its own in place of keys and values"
        )  # fmt: skip
        raise RefusedError(
            f"{named(layers)} of {type(model).__name__} {is_are(layers)} {kind}, which {keeps}, so "
            f"the folder cannot be exported; {ONNX_ROUTE}"
        )


def refuse_missing_layers(model: Any, missing: Sequence[int], entered: Sequence[int]) -> None:
    """Raises RefusedError for layers that never called transformers' attention interface."""
    if not missing:
        return
    if uses_alibi(model.config):
        raise RefusedError(
            f"{type(model).__name__} adds a bias by position to its attention (ALiBi), which the "
            "operator does not compute; this model cannot be exported"
        )
    what = "compute" if len(missing) > 1 else "computes"
    if entered:
        reason = f"{what} no attention, or attention in code of their own"
    else:
        reason = f"{what} attention in code of their own, or none"
    raise RefusedError(
        f"{named(missing)} of {type(model).__name__} {reason}: they do not call transformers' "
        f"attention interface, so the folder cannot be exported; {ONNX_ROUTE}"
    )


def refuse_experts(model: Any, reason: str) -> None:
    """Raises RefusedError where tracing failed, for `reason`, and the model sorts by expert."""
    for module in model.modules():
        if re.search(r"(Experts|MoE|MOE|MoeBlock|MoeLayer)$", type(module).__name__):
            raise RefusedError(
                f"{type(model).__name__} is a mixture of experts ({type(module).__name__}), whose "
                f"tokens are sorted by expert at run time, which a trace cannot follow ({reason}); "
                f"{_EXPERTS_ROUTE}"
            )


def unsupported_operator(model: Any, error: Exception) -> RefusedError:
    """torch's exporter has no ONNX form for an operation of the model."""
    found = re.search(r"'([\w:]+)'", str(error))
    operation = found[1] if found else str(error).splitlines()[0]
    what = " (complex numbers)" if re.search("polar|complex", operation) else ""
    return RefusedError(
        f"{type(model).__name__} uses the operation {operation}{what}, for which torch's exporter "
        f"has no ONNX form; {ONNX_ROUTE}"
    )


def named(layers: Sequence[int]) -> str:
    """`layer 3` or `layers [1, 3]`."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {list(layers)}"


def is_are(layers: Sequence[int]) -> str:
    """The verb for `named`."""
    return "is" if len(layers) == 1 else "are"
