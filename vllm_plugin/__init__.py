"""TriangleMix inside vLLM: a plug-in that changes nothing until it is configured."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """The entry point in `vllm.general_plugins`: run by vLLM in each of its processes."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "trianglemix.vllm.cpu.TriangleCPUBackend")
