"""The attention layers of the served model that become triangle layers, each looked at first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm.config import ServingConfig
from trianglemix.vllm.counters import CountBoard, LayerCount, count_folder
from trianglemix.vllm.errors import ServingError

_PLAIN_CACHES: Final = ("auto", "float16", "bfloat16", "float32")
_NO_WINDOW: Final = (None, -1, (-1, -1))
_DRAFT: Final = re.compile(r"(^|\.)draft")


@dataclass(frozen=True)
class TriangleLayer:
    """One triangle layer: its number in the model, its pattern, its count of rows."""

    index: int
    pattern: TrianglePattern
    count: LayerCount


def layer_index(name: str) -> int | None:
    """5 of `model.layers.5.self_attn.attn`; None of layers of a draft model, or not numbered once.

    Pipeline stages number their layers as the whole model does.
    """
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if len(numbers) == 1 and not _DRAFT.search(name) else None


def prepare_layers(
    vllm_config: Any,
    layer_names: Iterable[str],
    kv_cache_spec: Any,
    config: ServingConfig,
    board: CountBoard,
) -> tuple[TriangleLayer, ...]:
    """Makes triangle layers of those that the configuration names, among `layer_names`.

    Raises:
        ServingError: one of them is no plain causal attention over a plain cache, or a layer of
            this process is named that has no attention at all.
    """
    modules = vllm_config.compilation_config.static_forward_context
    _check_all_there(vllm_config, modules, config)
    named = {name: index for name in layer_names if (index := layer_index(name)) is not None}
    chosen = {name: index for name, index in named.items() if index in config.layers}
    for name in chosen:
        _check_attention(name, modules[name].impl, kv_cache_spec)
    counts = board.count_layers(chosen.values())
    for (name, index), count in zip(chosen.items(), counts, strict=True):
        modules[name].impl.triangle = TriangleLayer(index, config.pattern, count)
    return tuple(modules[name].impl.triangle for name in chosen)


def count_board(vllm_config: Any) -> CountBoard:
    """Where this worker counts: in a file, if it is the first of its tensor-parallel group."""
    parallel = vllm_config.parallel_config
    first = parallel.rank % parallel.tensor_parallel_size == 0
    return CountBoard(count_folder(vllm_config.instance_id) if first else None)


def _check_all_there(vllm_config: Any, modules: Mapping[str, Any], config: ServingConfig) -> None:
    first, stop = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    here = {layer_index(name) for name, module in modules.items() if hasattr(module, "impl")}
    missing = sorted(
        layer for layer in config.layers if first <= layer < stop and layer not in here
    )
    if missing:
        raise ServingError(
            f"layer {missing[0]} is named as a triangle layer, but has no attention that vLLM "
            "numbers so; leave it out"
        )


def _check_attention(name: str, attention: Any, kv_cache_spec: Any) -> None:
    reason = _refused(attention, kv_cache_spec)
    if reason:
        raise ServingError(f"layer {name} cannot be a triangle layer: {reason}; leave it out")


def _refused(attention: Any, kv_cache_spec: Any) -> str | None:
    """Why an attention is not taken, or None."""
    if not hasattr(type(attention), "triangle"):
        return (
            f"vLLM runs it by {type(attention).__name__}, which the plug-in does not know "
            "(it takes FLASH_ATTN on CUDA, CPU_ATTN on the CPU)"
        )
    if str(attention.attn_type).rsplit(".", 1)[-1].lower() != "decoder":
        return f"its attention is of the type {attention.attn_type}, not a decoder's"
    window = getattr(kv_cache_spec, "sliding_window", None)
    if attention.sliding_window not in _NO_WINDOW or window is not None:
        return f"it has a sliding window of its own ({window or attention.sliding_window})"
    if type(kv_cache_spec).__name__ != "FullAttentionSpec":
        return f"its cache is of the kind {type(kv_cache_spec).__name__}"
    if attention.alibi_slopes is not None:
        return "it has a bias by position (ALiBi)"
    if attention.sinks is not None:
        return "it has sinks in its softmax"
    if attention.kv_cache_dtype not in _PLAIN_CACHES:
        return f"its cache is quantised ({attention.kv_cache_dtype})"
    reason: str | None = attention.refusal()
    return reason
