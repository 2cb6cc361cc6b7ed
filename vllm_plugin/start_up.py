"""What happens once, in the front end, before an engine's workers start.

vLLM makes the configuration of every engine in `EngineArgs.create_engine_config` and every request
in `InputProcessor.process_inputs`, both in the front end. Each is wrapped by a function that calls
it, and then looks whether there is anything to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from trianglemix.vllm.counters import count_folder
from trianglemix.vllm.engine_config import configuration
from trianglemix.vllm.metrics import watch_counts
from trianglemix.vllm.refusals import check_engine
from trianglemix.vllm.section_values import SECTION
from trianglemix.vllm.versions import check_version

_LOGGER: Final = logging.getLogger("vllm.trianglemix")
_MARK: Final = "_trianglemix_wrapped"


def wrap_engine_config(engine_args: Any, version: str) -> None:
    """Has every configuration that `engine_args` (vLLM's `EngineArgs`) makes settled by us."""

    def after(_: Any, vllm_config: Any) -> None:
        settle(vllm_config, version)

    _call_after(engine_args, "create_engine_config", after)


def wrap_requests(input_processor: Any) -> None:
    """Has the prefix cache of every request of `input_processor` (vLLM's class) salted."""

    def after(processor: Any, request: Any) -> None:
        config = configuration(processor.vllm_config)
        if config is not None:
            salt = f"{SECTION}-{config.salt}"
            request.cache_salt = f"{salt}:{request.cache_salt}" if request.cache_salt else salt

    _call_after(input_processor, "process_inputs", after)


def settle(vllm_config: Any, version: str) -> None:
    """Checks an engine's configuration, and leaves nothing in it to look up or to choose.

    Raises:
        ServingError: a version, a device or a feature of vLLM that is not taken.
        ConfigurationError, ExportError: the section is not understood, or not this model's.
    """
    config = configuration(vllm_config)
    section = vllm_config.additional_config
    if config is None:
        if isinstance(section, dict) and SECTION in section:
            section[SECTION]["enabled"] = False  # for workers that do not see our environment
        return
    device = vllm_config.device_config.device_type
    warning = check_version(version, device)
    check_engine(vllm_config)
    section[SECTION] = config.as_section()
    vllm_config.model_config.disable_cascade_attn = True
    if device == "cuda" and vllm_config.attention_config.backend is None:
        vllm_config.attention_config.backend = _flash_attention()
    _LOGGER.info("TriangleMix: %s", config.description)
    if warning:
        _LOGGER.warning("%s", warning)
    watch_counts(count_folder(vllm_config.instance_id))


def _flash_attention() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum.FLASH_ATTN


def _call_after(owner: Any, name: str, after: Callable[[Any, Any], None]) -> None:
    """Replaces a method by one that hands its object and result to `after`; once only."""
    method = getattr(owner, name)
    if getattr(method, _MARK, False):
        return

    @wraps(method)
    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        result = method(self, *arguments, **named)
        after(self, result)
        return result

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
