"""The ONNX Runtime backend: opens a session with the native operator on the provider asked for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.library import LibraryNotFoundError, library_path
from trianglemix.custom_ops.operators import is_ours
from trianglemix.manifest.interface import carried_inputs
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.backends.backend import DeviceCache, Kernel
from trianglemix.runtime.backends.ort_cache import (
    SHAREABLE,
    GrowingCache,
    RecomputingCache,
    SharedCache,
)
from trianglemix.runtime.backends.ort_errors import ORT_ERRORS, execution_error
from trianglemix.runtime.backends.ort_interface import check_interface
from trianglemix.runtime.backends.providers import (
    CUDA,
    PROVIDERS,
    Provider,
    choose_provider,
    present,
    warn_without_kernel,
)
from trianglemix.runtime.errors import FallbackError, ProviderError
from trianglemix.runtime.memory import available_cuda_bytes, available_host_bytes
from trianglemix.runtime.model_folder import ModelFolder

_LOG = logging.getLogger(__name__)
_CUDA_LIBRARY: Final = "libtrianglemix_cuda.so"
_ERRORS_ONLY: Final = 3  # it warns of prompt_length being an input with a default, as meant
_RECORD_ASSIGNMENT: Final = "session.record_ep_graph_assignment_info"
_NO_CACHE: Final = (
    "this model has no KV cache: every new token reads the whole text again, of at most %s tokens; "
    "for speed export its source with a cache (past_key_values and present)"
)
FALLBACK_SCORE_BYTES: Final = 28
"""Bytes per score (head, row, key) that the function body holds at its peak.

Measured on ONNX Runtime 1.31 with 2 to 16 heads at 2,000 to 6,000 tokens: 23 to 28.
"""


@dataclass(frozen=True)
class OrtSettings:
    """How a session is opened: `provider` "auto" or of `PROVIDERS`; `threads` None = all cores."""

    provider: str = "auto"
    allow_fallback: bool = False
    threads: int | None = None
    profile_prefix: Path | None = None


class OrtBackend:
    """A model in an ONNX Runtime session, on a `provider` of `PROVIDERS`.

    `kernel` is "native", or "fallback" where the model runs on the operator's function body;
    `session` is for profiles and for what this class does not cover.
    """

    def __init__(
        self, session: ort.InferenceSession, folder: ModelFolder, provider: str, kernel: Kernel
    ) -> None:
        self.session = session
        self.manifest: Manifest = folder.manifest
        self.provider = provider
        self.kernel: Kernel = kernel
        self._num_heads = 0 if kernel == "native" else operator_heads(folder.model_path)

    def open_cache(self, batch: int, slots: int) -> DeviceCache:
        """See `Backend.open_cache`.

        The function body computes scores for every slot, used or not, and standard operators
        promise nothing about one buffer for past and present: it gets neither spare slots nor one.
        """
        device = "cuda" if self.provider == "cuda" else "cpu"  # the host's, for every other
        if not self.manifest.has_cache:
            return RecomputingCache(self.session, self.manifest, device, batch)
        known = all(x.role in SHAREABLE for x in carried_inputs(self.manifest.inputs))
        if self.manifest.shared_cache and known and self.kernel == "native":
            return SharedCache(self.session, self.manifest, device, batch, slots)
        return GrowingCache(self.session, self.manifest, device, batch)

    def check_memory(self, batch: int, rows: int, keys: int) -> None:
        """See `Backend.check_memory`."""
        if self.kernel == "native":
            return
        on_gpu = self.provider == "cuda"
        free = available_cuda_bytes() if on_gpu else available_host_bytes()
        needed = batch * self._num_heads * rows * keys * FALLBACK_SCORE_BYTES
        if free is not None and needed > free:
            raise FallbackError(
                f"the function body would need {needed / 2**30:.1f} GiB for the scores of {rows} "
                f"new tokens over {keys}, but {free / 2**30:.1f} GiB are free; use the native "
                "library, or a smaller prefill chunk"
            )


def open_backend(folder: ModelFolder, settings: OrtSettings) -> OrtBackend:
    """Loads the folder's model.

    Raises:
        ProviderError: the provider is unknown, not in this ONNX Runtime, or does not start.
        FallbackError: the native library cannot be used and `allow_fallback` is False.
        ExecutionError: ONNX Runtime cannot load the model.
        FolderError: it is another model than the manifest's.
    """
    available = ort.get_available_providers()
    provider = choose_provider(settings.provider, available)
    options = ort.SessionOptions()
    options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    options.log_severity_level = _ERRORS_ONLY
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if settings.profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile_prefix)
    kernel = _register_library(options, folder, settings.allow_fallback)
    session = _open_session(folder, options, present(provider, available))
    check_interface(session, folder)
    if provider.own not in session.get_providers():
        provider = _without(provider, settings.provider)
    elif provider.name == "cuda" and kernel == "native":
        _warn_of_cpu_operator(session)
    if not provider.has_kernel and operator_heads(folder.model_path):
        warn_without_kernel(provider, kernel, available)
    if not folder.manifest.has_cache:
        _LOG.warning(_NO_CACHE, folder.manifest.context_length)
    return OrtBackend(session, folder, provider.name, kernel)


def operator_heads(model_path: Path) -> int:
    """The largest `num_heads` of the model's nodes of our operators; 0 where it has none.

    Raises:
        ExecutionError: the file is no ONNX model.
    """
    heads = [
        attribute.i
        for node in _read(model_path).graph.node
        if is_ours(node.domain, node.op_type)
        for attribute in node.attribute
        if attribute.name == contract.ATTR_NUM_HEADS
    ]
    return max(heads, default=0)


def _carries_function(model_path: Path) -> bool:
    """Whether the file says in standard operators what the operator means.

    One whose nodes rotate or unpack inside cannot: no function can ask for absent inputs.
    """
    functions = _read(model_path).functions
    return any(is_ours(x.domain, x.name) for x in functions)


def _read(model_path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(model_path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise execution_error(f"{model_path} cannot be loaded", error) from error


def _register_library(
    options: ort.SessionOptions, folder: ModelFolder, allow_fallback: bool
) -> Kernel:
    """Registers the native operator, or says why the model may run without it."""
    try:
        options.register_custom_ops_library(str(library_path()))
        return "native"
    except LibraryNotFoundError as error:
        reason = str(error)
    except ORT_ERRORS as error:
        reason = f"ONNX Runtime {ort.__version__} refuses the native library: {error}"
    reason = " ".join(reason.split())
    if operator_heads(folder.model_path) == 0:
        return "native"  # a dense twin: every node of it is ONNX Runtime's own
    if not _carries_function(folder.model_path):
        raise FallbackError(
            f"{reason}; this model carries no function body to run on instead; export its source "
            "with --target cpu for one that does"
        )
    if not allow_fallback:
        raise FallbackError(
            f"{reason}; to run on the operator's slow function body instead, pass "
            "allow_fallback=True or --allow-fallback"
        )
    _LOG.warning("%s: running on the operator's slow function body", reason)
    return "fallback"


def _open_session(
    folder: ModelFolder, options: ort.SessionOptions, providers: list[str]
) -> ort.InferenceSession:
    if CUDA in providers and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA libraries from pip packages are not on the loader's path
    try:
        return ort.InferenceSession(str(folder.model_path), options, providers=providers)
    except ORT_ERRORS as error:
        raise execution_error(f"{folder.model_path} cannot be loaded", error) from error


def _without(provider: Provider, wanted: str) -> Provider:
    """The CPU, where a provider that nobody asked for by name did not start.

    Raises:
        ProviderError: it was asked for.
    """
    if wanted != "auto":
        raise ProviderError(
            f"ONNX Runtime could not start its {provider.name} provider (its log says why); "
            "install the libraries it names, or use the provider cpu"
        )
    _LOG.warning("the CUDA provider did not start (see ONNX Runtime's log): running on the CPU")
    return PROVIDERS["cpu"]


def _warn_of_cpu_operator(session: ort.InferenceSession) -> None:
    """A CUDA session whose TriangleAttention nodes fell to the CPU copies every tensor twice."""
    read = getattr(session, "get_provider_graph_assignment_info", None)
    if read is None:  # an older ONNX Runtime: the operator is where its kernels are
        falls_to_cpu = not library_path().with_name(_CUDA_LIBRARY).is_file()
    else:
        falls_to_cpu = any(
            is_ours(contract.DOMAIN, node.op_type)
            for part in read()
            if part.ep_name != CUDA
            for node in part.get_nodes()
        )
    if falls_to_cpu:
        _LOG.warning(
            "the attention of this CUDA session runs on the CPU, which is slow: this installation "
            "of trianglemix has no CUDA kernels; install the wheel that was built with CUDA"
        )
