"""What vLLM offers and layers with a role cannot carry: looked for before an engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from trianglemix.vllm.errors import ServingError

FLASH_ATTENTION: Final = 3
"""The generation of FlashAttention whose calls we make."""
_PLAIN_CACHES: Final = ("auto", "float16", "bfloat16", "float32")


def check_engine(vllm_config: Any) -> None:
    """Raises ServingError with every reason why this engine cannot have layers of ours."""
    reasons = [*_of_model(vllm_config.model_config), *_of_parallelism(vllm_config.parallel_config)]
    reasons += [*_of_cache(vllm_config.cache_config), *_of_guessing(vllm_config)]
    if vllm_config.device_config.device_type == "cuda":
        reasons += _of_backend(vllm_config.attention_config)
    if reasons:
        raise ServingError(
            f"TriangleMix cannot serve this: {'; '.join(reasons)}. Change that, or switch "
            "TriangleMix off"
        )


def _of_model(model: Any) -> Iterator[str]:
    if model.use_mla:
        yield "the model keeps its keys compressed (MLA)"
    if model.is_encoder_decoder:
        yield "the model has an encoder"
    if getattr(model, "is_mm_prefix_lm", False):
        yield "the model looks ahead inside images (a prefix mask)"
    if model.runner_type != "generate":
        yield f"the model is run as {model.runner_type!r}, not to generate"


def _of_parallelism(parallel: Any) -> Iterator[str]:
    for kind in ("prefill", "decode"):
        size = getattr(parallel, f"{kind}_context_parallel_size", 1)
        if size > 1:
            yield f"the context is split among {size} devices in {kind}"
    if parallel.use_ubatching:
        yield "steps are cut into two batches (--enable-dbo)"


def _of_cache(cache: Any) -> Iterator[str]:
    if cache.cache_dtype not in _PLAIN_CACHES:
        yield f"the cache is quantised ({cache.cache_dtype})"
    if getattr(cache, "kv_sharing_fast_prefill", False):
        yield "layers that share keys skip rows (--kv-sharing-fast-prefill)"


def _of_guessing(vllm_config: Any) -> Iterator[str]:
    speculation = vllm_config.speculative_config
    if getattr(speculation, "enable_adaptive_verification", False):
        yield "the device alone decides how many guesses a step checks (adaptive verification)"


def _of_backend(attention: Any) -> Iterator[str]:
    name = getattr(attention.backend, "name", attention.backend)
    if name not in (None, "FLASH_ATTN"):
        yield f"the attention backend is {name}, not FLASH_ATTN"
    if getattr(attention, "backend_per_kind", None):
        yield "attention backends are chosen by the kind of cache"
    version = attention.flash_attn_version
    if version not in (None, FLASH_ATTENTION):
        yield f"FlashAttention {version} is asked for, not {FLASH_ATTENTION}"
