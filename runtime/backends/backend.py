"""The interface between generation and a device's runtime."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from trianglemix.custom_ops.arrays import Array
from trianglemix.manifest.feeds import Call
from trianglemix.manifest.manifest import Manifest

Kernel = Literal["native", "fallback", "static"]
Logits = NDArray[np.float32]


def as_float32(raw: Array, dtype: str) -> Logits:
    """Numbers of a manifest's `dtype`; bfloat16, of which NumPy has none, comes as its bits."""
    if dtype != "bfloat16":
        return raw.astype(np.float32)
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)  # a float32's upper half


class DeviceCache(Protocol):
    """The keys and values of one batch, in every layer, where the model runs."""

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` tokens in all; what the cache holds stays."""

    def step(self, call: Call, want_logits: bool) -> Logits | None:
        """Runs the model once; the new tokens' keys and values join the cache.

        Args:
            call: the new tokens, and where they stand among those that the cache holds.
            want_logits: False spares the copy of logits that nobody reads.

        Returns:
            `[B, vocabulary]` of each row's last position, or None if they were not wanted.

        Raises:
            ExecutionError: the runtime failed; the cache then counts as unchanged.
        """


class Backend(Protocol):
    """A loaded model on one device."""

    @property
    def manifest(self) -> Manifest:
        """What the model's folder says about it."""

    @property
    def provider(self) -> str:
        """What runs the model, in one word: "cpu", "cuda", "npu", or another provider."""

    @property
    def kernel(self) -> Kernel:
        """Whether the operator is a kernel, its slow function body, or part of static graphs."""

    def open_cache(self, batch: int, slots: int) -> DeviceCache:
        """An empty cache for `batch` rows with room for `slots` tokens."""

    def check_memory(self, batch: int, rows: int, keys: int) -> None:
        """Refuses a step of `rows` new tokens over `keys` tokens that cannot fit in memory.

        Raises:
            FallbackError: the function body's scores would need more memory than there is.
        """
