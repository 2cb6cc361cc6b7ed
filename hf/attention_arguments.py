"""What models of transformers hand to their attention function besides queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

_HARMLESS: Final = frozenset(
    {
        "cache_position",
        "is_causal",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that do not change what an attention computes."""
_MEANINGS: Final = {
    "s_aux": "attention sinks of the softmax",
    "sinks": "attention sinks of the softmax",
    "position_bias": "a bias by position",
    "alibi": "a bias by position, ALiBi",
    "cache": "a cache of its own",
}


def unknown_arguments(
    given: Mapping[str, Any], understood: frozenset[str] = frozenset()
) -> list[str]:
    """Names of the arguments that may change what the attention means."""
    known = _HARMLESS | understood
    return sorted(
        name for name, x in given.items() if name not in known and x is not None and x is not False
    )


def describe_arguments(names: Iterable[str]) -> str:
    """The names, each with the technique it belongs to where known."""
    return ", ".join(f"{n} ({_MEANINGS[n]})" if n in _MEANINGS else n for n in names)


def uses_alibi(config: Any) -> bool:
    """Whether a configuration of transformers asks for a bias by position, ALiBi."""
    inner = getattr(config, "attn_config", None)
    return getattr(config, "model_type", None) == "bloom" or any(
        bool(getattr(part, "alibi", False)) for part in (config, inner)
    )
