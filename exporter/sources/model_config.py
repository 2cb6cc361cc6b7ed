"""What a model's `config.json` (or genai's) says: layers, heads, windows, special ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trianglemix.exporter.sources.companions import Companions

_SECTIONS: Final = ("text_config", "llm_config", "language_config")
_CONTEXT_KEYS: Final = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length",
    "n_ctx",
)  # fmt: skip
_ATTENTION: Final = ("full_attention", "sliding_attention", "chunked_attention", "attention")
_HYBRID: Final = ("mamba", "ssm", "conv", "recurrent", "layer_period", "layer_indices", "hybrid")
_OPTIONAL: Final = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "qwen2_vl", "qwen2_5_vl")
"""Families that slide no window unless `use_sliding_window` says so."""
_EVERY_LAYER: Final = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "ministral")
_EVERY_OTHER: Final = ("gemma2", "gpt_oss", "vaultgemma")
_OTHER_WINDOWS: Final = ("attention_window_size", "local_attention", "local_attention_window_len")
"""Windows by names, and of layers, whose rules are not known here."""
_PATTERNS: Final = {"gemma3": 6, "gemma3_text": 6, "gemma3n": 5, "gemma3n_text": 5, "cohere2": 4,
                    "exaone4": 4, "olmo3": 4}  # fmt: skip
_ID_FILES: Final = ("config.json", "generation_config.json", "genai_config.json")
_ID_ENDINGS: Final = ("_token_id", "_token_index", "_token_ids")


@dataclass(frozen=True)
class LayerAttention:
    """What a layer's rows may see: `window` keys with themselves, or their chunk of `chunk`."""

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Facts of one configuration file, None where it does not state them.

    `layers` has an entry per attention layer. `raw` is the section that describes the text model.
    """

    name: str
    raw: Mapping[str, Any]
    num_layers: int | None
    num_heads: int | None
    kv_num_heads: int | None
    head_size: int | None
    softcap: float | None
    layers: tuple[LayerAttention, ...] | None
    is_hybrid: bool


def read_model_config(companions: Companions) -> ModelConfig | None:
    """`config.json`, else `genai_config.json`; None without either."""
    config = companions.settings("config.json")
    if config:
        return _of_transformers(text_section(config))
    genai = companions.settings("genai_config.json").get("model")
    decoder = genai.get("decoder") if isinstance(genai, dict) else None
    return _of_genai(decoder) if isinstance(decoder, dict) else None


def read_context_length(companions: Companions) -> int | None:
    """Tokens that the model's configuration allows, or genai's where that says less."""
    config, genai = companions.settings("config.json"), companions.settings("genai_config.json")
    sections = [config, *(config.get(name) for name in _SECTIONS)]
    own = (_number(section, key) for section in sections for key in _CONTEXT_KEYS)
    theirs = (_number(genai.get("model"), "context_length"),
              _number(genai.get("search"), "max_length"))  # fmt: skip
    limits = [next((length for length in lengths if length), None) for lengths in (own, theirs)]
    return min((limit for limit in limits if limit), default=None)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model: itself, or one inside."""
    inner = (config.get(name) for name in _SECTIONS)
    found = next((section for section in inner if isinstance(section, dict) and section), None)
    return config if found is None or "num_hidden_layers" in config else found


def _of_transformers(config: Mapping[str, Any]) -> ModelConfig:
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    count = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    size = _first(config, "head_dim")
    if size is None and hidden and heads and hidden % heads == 0:
        size = hidden // heads
    if any(key in config for key in ("kv_lora_rank", "global_head_dim")):
        size = None  # of several sizes
    cap = config.get("attn_logit_softcapping")
    layers = layer_attention(config, count)
    return ModelConfig(
        name="config.json",
        raw=config,
        num_layers=count if layers is None else len(layers),
        num_heads=heads,
        kv_num_heads=_kv_heads(config),
        head_size=size,
        softcap=float(cap) if isinstance(cap, int | float) else None,
        layers=layers,
        is_hybrid=any(word in key for key in config for word in _HYBRID),
    )


def _of_genai(decoder: Mapping[str, Any]) -> ModelConfig:
    count = _number(decoder, "num_hidden_layers")
    sliding = decoder.get("sliding_window")
    window, chosen = _number(sliding, "window_size"), (sliding or {}).get("layers")
    layers = None
    if count and window and isinstance(chosen, list):
        layers = tuple(
            LayerAttention(window if layer in chosen else None) for layer in range(count)
        )
    return ModelConfig(
        name="genai_config.json",
        raw={},
        num_layers=count,
        num_heads=_number(decoder, "num_attention_heads"),
        kv_num_heads=_number(decoder, "num_key_value_heads"),
        head_size=_number(decoder, "head_size"),
        softcap=None,
        layers=layers,
        is_hybrid=False,
    )


def layer_attention(
    config: Mapping[str, Any], count: int | None
) -> tuple[LayerAttention, ...] | None:
    """What each attention layer sees, by the rules of transformers; None where it is not known."""
    window, chunk = _number(config, "sliding_window"), _number(config, "attention_chunk_size")
    types = config.get("layer_types")
    if isinstance(types, list) and all(isinstance(kind, str) for kind in types):
        kinds = [kind for kind in types if kind in _ATTENTION]
        return tuple(_layer(kind, window, chunk) for kind in kinds)
    if count is None or any(_number(config, key) for key in _OTHER_WINDOWS):
        return None
    local = config.get("attention_layers")
    if isinstance(local, list):  # GPT-Neo
        own = LayerAttention(_number(config, "window_size"))
        return _where([kind == "local" for kind in local], own)
    if chunk:
        rope = config.get("no_rope_layers")
        chunked = [bool(one) for one in rope] if isinstance(rope, list) else []
        return _where(chunked, LayerAttention(chunk=chunk)) if len(chunked) == count else None
    if not window:
        return (LayerAttention(),) * count
    slides = _sliding_layers(config, count)
    return None if slides is None else _where(slides, LayerAttention(window))


def _layer(kind: str, window: int | None, chunk: int | None) -> LayerAttention:
    if kind == "chunked_attention":
        return LayerAttention(chunk=chunk)
    return LayerAttention(window if kind == "sliding_attention" else None)


def _where(chosen: list[bool], layer: LayerAttention) -> tuple[LayerAttention, ...]:
    return tuple(layer if one else LayerAttention() for one in chosen)


def _sliding_layers(config: Mapping[str, Any], count: int) -> list[bool] | None:
    """Which layers slide the window, where the file lists no types (older files do not)."""
    family = config.get("model_type")
    if not config.get("use_sliding_window", family not in _OPTIONAL):
        return [False] * count
    first = _number(config, "max_window_layers")
    if first is not None:
        return [layer >= first for layer in range(count)]
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if pattern is None:
        pattern = _PATTERNS.get(str(family), 2 if family in _EVERY_OTHER else None)
    if isinstance(pattern, str) and pattern:  # "LLLG"
        return [pattern[layer % len(pattern)] == "L" for layer in range(count)]
    if isinstance(pattern, int) and pattern > 0:
        return [(layer + 1) % pattern != 0 for layer in range(count)]
    return [True] * count if family in _EVERY_LAYER else None


def _kv_heads(config: Mapping[str, Any]) -> int | None:
    """Falcon counts otherwise with `multi_query`; Gemma 4's layers differ."""
    if "num_global_key_value_heads" in config:
        return None
    if config.get("multi_query"):
        return None if config.get("new_decoder_architecture") else 1
    return _first(config, "num_key_value_heads", "num_kv_heads")


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    numbers = (_number(config, key) for key in keys)
    return next((number for number in numbers if number is not None), None)


def _number(section: object, key: str) -> int | None:
    value = section.get(key) if isinstance(section, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def special_ids(companions: Companions) -> tuple[int, ...]:
    """Of every `..._token_id` in the configuration files, ascending."""
    found = {number for name in _ID_FILES for number in _ids(companions.settings(name))}
    return tuple(sorted(found))


def _ids(section: Mapping[str, Any]) -> Iterator[int]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _ids(value)
        elif key.endswith(_ID_ENDINGS):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):
                    yield number
