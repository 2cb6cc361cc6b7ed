"""Caches and states as ONNX Runtime values, bound to a session's inputs and outputs."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from trianglemix.manifest.feeds import Call, call_feeds, carried_shape, carried_value
from trianglemix.manifest.interface import (
    GraphInput,
    InputRole,
    carried_inputs,
    changed_on_the_way,
)
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.backends.backend import Logits, as_float32
from trianglemix.runtime.backends.device_memory import DeviceMemory
from trianglemix.runtime.backends.ort_errors import ORT_ERRORS, execution_error

SHAREABLE: Final[tuple[InputRole, ...]] = ("past_key", "past_value", "state")
"""What a `SharedCache` can hold: the operator's own caches, and states, which do not grow."""

_MATRIX: Final = 2


class _BoundCache:
    """What all kinds of cache share: feeding, running, and reading the logits."""

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, device: str) -> None:
        self._session = session
        self._manifest = manifest
        self._device = device
        self._carried = carried_inputs(manifest.inputs)
        self._binding = session.io_binding()

    def _run(self, call: Call) -> None:
        # bind_cpu_input does not know inputs that have a default, such as prompt_length. A value
        # made from an array borrows its memory, so that both have to live until the run is over.
        # (ascontiguousarray would give a scalar an axis.)
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
            for name, array in call_feeds(self._manifest.inputs, call).items()
        }
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise execution_error("the model failed to run", error) from error

    def _bind_logits(self) -> None:
        self._binding.bind_output(self._manifest.logits, "cpu")

    def _memory(self, value: GraphInput) -> DeviceMemory:
        return DeviceMemory(self._session, value.dtype, self._device)


class SharedCache(_BoundCache):
    """Buffers `[B, G, slots, D]` that are past and present at once.

    They stay bound, so that a step writes its new tokens and moves nothing else. States have two
    buffers each, one that is read and one that is written, in turn.
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
        self._caches = [value for value in self._carried if value.role != "state"]
        self._cache_memory = DeviceMemory(session, manifest.cache_dtype, device)
        self.buffers = {
            value.name: self._cache_memory.slots(carried_shape(value, batch, slots))
            for value in self._caches
        }
        self._states = {
            value: [self._memory(value).zeros(carried_shape(value, batch)) for _ in range(2)]
            for value in self._carried
            if value.role == "state"
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
            room = self._cache_memory.slots((batch, heads, slots - self.slots, size))
            self.buffers[name] = self._cache_memory.joined(old, room)
        self.slots = slots
        self._bind_inputs()

    def step(self, call: Call, want_logits: bool) -> Logits | None:
        """See `DeviceCache.step`."""
        self._bind_outputs(want_logits)
        self._run(call)
        logits = read_last_row(self._last_output()) if want_logits else None
        for buffers in self._states.values():
            buffers.reverse()
        self._bind_states()
        return logits

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
        for value in self._caches:
            self._binding.bind_ortvalue_output(value.carried_from, self.buffers[value.name])
        self._bind_states()
        self._logits_bound = False

    def _bind_states(self) -> None:
        for value, (read, written) in self._states.items():
            self._binding.bind_ortvalue_input(value.name, read)
            self._binding.bind_ortvalue_output(value.carried_from, written)

    def _bind_outputs(self, want_logits: bool) -> None:
        if self._logits_bound and not want_logits:
            self._binding.clear_binding_outputs()
            self._bind_presents()
        if want_logits:  # always anew: the last step's logits had another length
            self._bind_logits()
            self._logits_bound = True


class GrowingCache(_BoundCache):
    """Each step's present tensors, handed on as the next step's past.

    Where an output is not the next input as it is (other axes, another type, the new tokens
    alone) it goes through the host's memory.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, device: str, batch: int
    ) -> None:
        super().__init__(session, manifest, device)
        self._changed = changed_on_the_way(manifest.inputs, manifest.outputs)
        self._held: dict[str, ort.OrtValue] = {}
        self._hand_on(
            {
                value.name: self._memory(value).zeros(carried_shape(value, batch))
                if value.role == "state"
                else self._memory(value).empty(carried_shape(value, batch))
                for value in self._carried
            }
        )

    def reserve(self, slots: int) -> None:
        """Nothing to do: every step makes its own room."""

    def step(self, call: Call, want_logits: bool) -> Logits | None:
        """See `DeviceCache.step`."""
        self._binding.clear_binding_outputs()
        for value in self._carried:
            device = "cpu" if self._changed[value.name] else self._device
            self._binding.bind_output(str(value.carried_from), device)
        if want_logits:
            self._bind_logits()
        self._run(call)
        outputs = self._binding.get_outputs()
        pairs = zip(self._carried, outputs, strict=False)  # the logits are behind them
        self._hand_on({value.name: self._next(value, output) for value, output in pairs})
        return read_last_row(outputs[-1]) if want_logits else None

    def _next(self, value: GraphInput, output: ort.OrtValue) -> ort.OrtValue:
        if not self._changed[value.name]:
            return output
        before = {value.name: self._held[value.name].numpy()} if value.appends else {}
        array = np.asarray(carried_value(value, before, output.numpy()), order="C")
        return ort.OrtValue.ortvalue_from_numpy(array, self._device)

    def _hand_on(self, values: dict[str, ort.OrtValue]) -> None:
        self._held = values
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)


class RecomputingCache(_BoundCache):
    """The tokens themselves, for a graph without a cache: every step reads the whole text."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, device: str, batch: int
    ) -> None:
        super().__init__(session, manifest, device)
        self._ids = np.zeros((batch, 0), np.int64)
        for value in self._carried:  # states, which start anew with every reading
            empty = self._memory(value).zeros(carried_shape(value, batch))
            self._binding.bind_ortvalue_input(value.name, empty)

    def reserve(self, slots: int) -> None:
        """Nothing to do: only tokens are held."""

    def step(self, call: Call, want_logits: bool) -> Logits | None:
        """See `DeviceCache.step`; tokens whose logits nobody wants wait for the next step."""
        ids = np.concatenate([self._ids, call.ids], axis=1)
        logits: Logits | None = None
        if want_logits:
            self._bind_logits()
            self._run(Call(ids, call.mask, None, call.prompt_end, last_logits_only=True))
            logits = read_last_row(self._binding.get_outputs()[-1])
        self._ids = ids
        return logits


def read_last_row(logits: ort.OrtValue) -> Logits:
    """`[B, vocabulary]` float32 of the last position of host logits `[B, S, vocabulary]`.

    Logits of two dimensions are `[B, vocabulary]` already.
    """
    shape = tuple(logits.shape())
    shape = (shape[0], 1, shape[1]) if len(shape) == _MATRIX else shape
    if logits.element_type() != TensorProto.BFLOAT16:
        rows: NDArray[Any] = logits.numpy().reshape(shape)[:, -1]
        return rows.astype(np.float32)
    count = int(np.prod(shape))
    raw = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(logits.data_ptr()))
    return as_float32(raw.reshape(shape)[:, -1], "bfloat16")
