"""The KV cache as ONNX Runtime values, bound to a session's inputs and outputs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from trianglemix.custom_ops.manifest import LayerCache, Manifest
from trianglemix.runtime.backends.backend import Feeds, Logits
from trianglemix.runtime.backends.device_memory import DeviceMemory
from trianglemix.runtime.backends.ort_errors import ORT_ERRORS, execution_error


class _BoundCache:
    """What both kinds of cache share: feeding, running, and reading the logits."""

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, device: str) -> None:
        self._session = session
        self._manifest = manifest
        self._device = device
        self._memory = DeviceMemory(session, manifest.cache_dtype, device)
        self._binding = session.io_binding()

    def _run(self, feeds: Feeds) -> None:
        # bind_cpu_input does not know inputs that have a default, such as prompt_length. A value
        # made from an array borrows its memory, so that both have to live until the run is over.
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in feeds.items()
        }
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise execution_error("the model failed to run", error) from error

    def _bind_logits(self) -> None:
        self._binding.bind_output(self._manifest.logits, "cpu")


class SharedCache(_BoundCache):
    """Buffers `[B, G, slots, D]` that are past and present at once.

    They stay bound, so that a step writes its new tokens and moves nothing else.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        device: str,
        batch: int,
        slots: int,
    ) -> None:
        super().__init__(session, manifest, device)
        self.slots = slots
        self._logits_bound = False
        self.buffers = {
            past: self._memory.slots((batch, heads, slots, size))
            for past, _, heads, size in cache_tensors(manifest)
        }
        self._bind_inputs()

    def reserve(self, slots: int) -> None:
        """Moves the tokens into larger buffers, one tensor at a time, on the device."""
        if slots <= self.slots:
            return
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for name, old in self.buffers.items():
            batch, heads, _, size = old.shape()
            room = self._memory.slots((batch, heads, slots - self.slots, size))
            self.buffers[name] = self._memory.joined(old, room)
        self.slots = slots
        self._bind_inputs()

    def step(self, feeds: Feeds, want_logits: bool) -> Logits | None:
        """See `DeviceCache.step`."""
        self._bind_outputs(want_logits)
        self._run(feeds)
        return read_last_row(self._last_output()) if want_logits else None

    def _last_output(self) -> ort.OrtValue:
        """The logits alone: wrapping every present costs more than all else around a step."""
        outputs = getattr(self._binding, "get_outputs_as_ortvaluevector", None)
        if outputs is None:  # an older ONNX Runtime
            return self._binding.get_outputs()[-1]
        vector = outputs()
        return ort.OrtValue(vector[len(vector) - 1])

    def _bind_inputs(self) -> None:
        for name, buffer in self.buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
        self._bind_presents()

    def _bind_presents(self) -> None:
        for past, present, _, _ in cache_tensors(self._manifest):
            self._binding.bind_ortvalue_output(present, self.buffers[past])
        self._logits_bound = False

    def _bind_outputs(self, want_logits: bool) -> None:
        if self._logits_bound and not want_logits:
            self._binding.clear_binding_outputs()
            self._bind_presents()
        if want_logits:  # always anew: the last step's logits had another length
            self._bind_logits()
            self._logits_bound = True


class GrowingCache(_BoundCache):
    """Each step's present tensors, handed on as the next step's past."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, device: str, batch: int
    ) -> None:
        super().__init__(session, manifest, device)
        self._presents = [present for _, present, _, _ in cache_tensors(manifest)]
        self._pasts = [past for past, _, _, _ in cache_tensors(manifest)]
        empty = [
            self._memory.empty((batch, heads, 0, size))
            for _, _, heads, size in cache_tensors(manifest)
        ]
        self._hand_on(empty)

    def reserve(self, slots: int) -> None:
        """Nothing to do: every step makes its own room."""

    def step(self, feeds: Feeds, want_logits: bool) -> Logits | None:
        """See `DeviceCache.step`."""
        self._binding.clear_binding_outputs()
        for present in self._presents:
            self._binding.bind_output(present, self._device)
        if want_logits:
            self._bind_logits()
        self._run(feeds)
        outputs = self._binding.get_outputs()
        self._hand_on(outputs[: len(self._presents)])
        return read_last_row(outputs[-1]) if want_logits else None

    def _hand_on(self, values: list[ort.OrtValue]) -> None:
        for name, value in zip(self._pasts, values, strict=True):
            self._binding.bind_ortvalue_input(name, value)


def cache_tensors(manifest: Manifest) -> Iterator[tuple[str, str, int, int]]:
    """Past name, present name, heads and head size of every cache tensor, keys before values."""
    layer: LayerCache
    for layer in manifest.cache:
        yield layer.past_key, layer.present_key, layer.kv_num_heads, layer.head_size
        yield layer.past_value, layer.present_value, layer.kv_num_heads, layer.value_head_size


def read_last_row(logits: ort.OrtValue) -> Logits:
    """`[B, vocabulary]` float32 of the last position of host logits `[B, S, vocabulary]`."""
    shape = tuple(logits.shape())
    if logits.element_type() != TensorProto.BFLOAT16:
        rows: NDArray[Any] = logits.numpy()[:, -1]
        return rows.astype(np.float32)
    # NumPy has no bfloat16: it is the upper half of a float32.
    count = int(np.prod(shape))
    raw = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(logits.data_ptr()))
    wide = np.zeros((shape[0], shape[2]), np.uint32)
    wide[:] = raw.reshape(shape)[:, -1]
    return (wide << np.uint32(16)).view(np.float32)
