"""The attention layers of the served model that get a role, each looked at first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trianglemix.vllm.config import ServingConfig
from trianglemix.vllm.counters import CountBoard, LayerCount, count_folder
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.roles import Keeps, role_of

_PLAIN_CACHES: Final = ("auto", "float16", "bfloat16", "float32")
_NO_WINDOW: Final = (None, -1, (-1, -1))
_DRAFT: Final = re.compile(r"(^|\.)draft")


@dataclass(frozen=True)
class ServedLayer:
    """One layer with a role: its number in the model, what its rows keep, its count of rows."""

    index: int
    keeps: Keeps
    count: LayerCount

    @property
    def role(self) -> str:
        """`triangle` or `block_sparse`."""
        return role_of(self.keeps)


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
) -> tuple[ServedLayer, ...]:
    """Gives those among `layer_names` that the configuration names their roles.

    Raises:
        ServingError: one of them is no plain causal attention over a plain cache, or a layer of
            this process is named that has no attention at all.
    """
    modules = vllm_config.compilation_config.static_forward_context
    _check_all_there(vllm_config, modules, config)
    named = {name: index for name in layer_names if (index := layer_index(name)) is not None}
    keeps = config.keeps
    chosen = {name: index for name, index in named.items() if index in keeps}
    for name, index in chosen.items():
        _check_attention(name, modules[name].impl, kv_cache_spec, role_of(keeps[index]))
    counts = board.count_layers([(index, role_of(keeps[index])) for index in chosen.values()])
    for (name, index), count in zip(chosen.items(), counts, strict=True):
        modules[name].impl.served = ServedLayer(index, keeps[index], count)
    return tuple(modules[name].impl.served for name in chosen)


def count_board(vllm_config: Any) -> CountBoard:
    """Where this worker counts: in a file, if it is the first of its tensor-parallel group."""
    parallel = vllm_config.parallel_config
    first = parallel.rank % parallel.tensor_parallel_size == 0
    return CountBoard(count_folder(vllm_config.instance_id) if first else None)


def _check_all_there(vllm_config: Any, modules: Mapping[str, Any], config: ServingConfig) -> None:
    first, stop = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    here = {layer_index(name) for name, module in modules.items() if hasattr(module, "impl")}
    keeps = config.keeps
    missing = sorted(layer for layer in keeps if first <= layer < stop and layer not in here)
    if missing:
        raise ServingError(
            f"layer {missing[0]} is named as a {_words(role_of(keeps[missing[0]]))} layer, but has "
            "no attention that vLLM numbers so; leave it out"
        )


def _check_attention(name: str, attention: Any, kv_cache_spec: Any, role: str) -> None:
    reason = _refused(attention, kv_cache_spec) or attention.refusal(role, kv_cache_spec)
    if reason:
        raise ServingError(f"layer {name} cannot be a {_words(role)} layer: {reason}; leave it out")


def _words(role: str) -> str:
    return role.replace("_", "-")


def _refused(attention: Any, kv_cache_spec: Any) -> str | None:
    """Why an attention is not taken in any role, or None."""
    if not hasattr(type(attention), "served"):
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
    return None
