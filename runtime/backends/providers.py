"""The execution providers of ONNX Runtime by name, and what becomes of our operator on each."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.runtime.backends.backend import Kernel
from trianglemix.runtime.errors import ProviderError

_LOG = logging.getLogger(__name__)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """`onnxruntime` holds ONNX Runtime's names, in order of preference; nodes go to the first."""

    name: str
    onnxruntime: tuple[str, ...]
    has_kernel: bool

    @property
    def own(self) -> str:
        """ONNX Runtime's name of the provider itself."""
        return self.onnxruntime[0]


PROVIDERS: Final = {
    provider.name: provider
    for provider in (
        Provider("cpu", (CPU,), has_kernel=True),
        Provider("cuda", (CUDA, CPU), has_kernel=True),
        Provider("tensorrt", ("TensorrtExecutionProvider", CUDA, CPU), has_kernel=False),
        Provider("openvino", ("OpenVINOExecutionProvider", CPU), has_kernel=False),
        Provider("webgpu", ("WebGpuExecutionProvider", CPU), has_kernel=False),
        Provider("directml", ("DmlExecutionProvider", CPU), has_kernel=False),
        Provider("coreml", ("CoreMLExecutionProvider", CPU), has_kernel=False),
    )
}


def choose_provider(wanted: str, available: list[str]) -> Provider:
    """The provider by its name; "auto" is CUDA where this ONNX Runtime has it, else the CPU.

    Raises:
        ProviderError: there is none of that name, or this ONNX Runtime does not have it.
    """
    if wanted == "auto":
        return PROVIDERS["cuda" if CUDA in available else "cpu"]
    if wanted not in PROVIDERS:
        names = ", ".join(["auto", *PROVIDERS])
        raise ProviderError(f"provider is {wanted!r}, but must be one of {names}")
    provider = PROVIDERS[wanted]
    if provider.own not in available:
        remedy = (
            "pip install 'trianglemix[gpu]' in an environment without the package onnxruntime"
            if wanted == "cuda"
            else "install the ONNX Runtime that brings it, or use the provider cpu"
        )
        raise ProviderError(
            f"provider {wanted} is not in the installed ONNX Runtime ({', '.join(available)}); "
            f"{remedy}"
        )
    return provider


def present(provider: Provider, available: list[str]) -> list[str]:
    """ONNX Runtime's names for a session: the provider, and what stands in for it where it has
    no kernel."""
    return [name for name in provider.onnxruntime if name in available]


def warn_without_kernel(provider: Provider, kernel: Kernel, available: list[str]) -> None:
    """Says in one line what becomes of the operator on a provider that has no kernel for it."""
    if kernel == "fallback":
        fate = (
            "it runs there as its function body, whose memory grows with the square of the prompt; "
            "for long prompts"
        )
    else:
        stand_in = present(provider, available)[1]
        device = "CUDA" if stand_in == CUDA else "CPU"
        fate = (
            f"its nodes run in the {device} kernel, with copies of their tensors between the two "
            "where memory is not shared, and the cache stays in host memory; for speed"
        )
    _LOG.warning(
        "%s has no kernel for %s: %s use the provider cpu or cuda",
        provider.own, OP_TYPE, fate,
    )  # fmt: skip
