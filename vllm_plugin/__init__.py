"""TriangleMix inside vLLM: a plug-in that changes nothing until it is configured."""

from __future__ import annotations

from typing import Final

from trianglemix.vllm.sections import additional_config

__all__ = ["additional_config", "register"]

_BACKENDS: Final = {
    "FLASH_ATTN": "trianglemix.vllm.cuda.TriangleFlashBackend",
    "CPU_ATTN": "trianglemix.vllm.cpu.TriangleCPUBackend",
}
"""vLLM's backends, and ours in their place: read by name, so only the one in use is imported."""


def register() -> None:
    """The entry point in `vllm.general_plugins`: run by vLLM in each of its processes."""
    from trianglemix.vllm.start_up import wrap_engine_config, wrap_requests
    from trianglemix.vllm.versions import is_taken
    from vllm import __version__
    from vllm.engine.arg_utils import EngineArgs

    wrap_engine_config(EngineArgs, __version__)
    if not is_taken(__version__):  # refused there, if it is configured
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.engine.input_processor import InputProcessor

    wrap_requests(InputProcessor)
    for name, path in _BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)
