"""A batch of sequences in the model's cache: how long they are, and how they get longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray
from trianglemix.manifest.feeds import Call
from trianglemix.manifest.interface import fixed_length
from trianglemix.runtime.backends.backend import Backend, DeviceCache, Kernel, Logits
from trianglemix.runtime.chunks import first_slots
from trianglemix.runtime.errors import PromptError

IntArray = NDArray[np.int64]

_GROWTH: Final = 1.5
_SLOT_STEP: Final = 64


class KVCache:
    """The tokens that `B` sequences have in the model so far.

    Rows are aligned on the right: a shorter row begins with pads. With `max_length` (tokens) the
    room is taken once and never exceeded; without it the cache grows as needed.
    """

    def __init__(self, backend: Backend, batch: int = 1, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise PromptError(f"max_length is {max_length}, but must be 1 or more")
        self.batch = batch
        self.length = 0
        self.pending: IntArray = np.zeros((batch, 0), np.int64)
        """Tokens `[B, n]` that were generated, but have not been through the model yet."""
        self._backend = backend
        self._manifest = backend.manifest
        self._max_length = max_length
        self._device: DeviceCache | None = None
        self._mask: IntArray = np.zeros((batch, 0), np.int64)
        self._tokens: IntArray = np.zeros(batch, np.int64)  # [B], real ones
        self._busy = Lock()

    def belongs_to(self, backend: Backend) -> bool:
        """Whether it holds keys and values of that very model."""
        return self._backend is backend

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While one generation goes on from it: two would mix their tokens.

        Raises:
            PromptError: another one has not ended.
        """
        if not self._busy.acquire(blocking=False):
            raise PromptError(
                "another generation on this cache has not ended; finish or close() it first"
            )
        try:
            yield
        finally:
            self._busy.release()

    @property
    def kernel(self) -> Kernel:
        """What runs the operator; see `Backend.kernel`."""
        return self._backend.kernel

    @property
    def provider(self) -> str:
        """The device it lies on."""
        return self._backend.provider

    @property
    def limit(self) -> int | None:
        """The most tokens it may ever hold, None where neither model nor user set a limit."""
        limits = (self._max_length, self._manifest.context_length)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def ends_at_switch(self) -> bool:
        """Whether the model computes otherwise from the next token on, for all tokens."""
        return self.length in self._manifest.length_switches

    def first_tile_slot(self, new: NDArray[np.bool_]) -> int | None:
        """Where the tiles of the rows begin to be counted, once `new` `[B, S]` has joined them.

        None where no layer goes by tiles. Rows of one call have their tiles' edges in common.
        """
        if not self._manifest.block_sparse_layers:
            return None
        held = self._mask[:, : self.length] != 0
        return first_slots(np.concatenate([held, new], axis=1))[0]

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` tokens; more than that when the cache has to grow anyway."""
        if slots <= self._mask.shape[1]:
            return
        if self._max_length is not None:
            room = self._max_length
        else:
            room = max(slots, int(self._mask.shape[1] * _GROWTH))
            room = -(-room // _SLOT_STEP) * _SLOT_STEP
        if self._device is None:
            self._device = self._backend.open_cache(self.batch, room)
        else:
            self._device.reserve(room)
        mask = np.zeros((self.batch, room), np.int64)
        mask[:, : self.length] = self._mask[:, : self.length]
        self._mask = mask

    def extend(
        self,
        ids: IntArray,
        real: NDArray[np.bool_] | None,
        prompt_end: int,
        want_logits: bool = True,
    ) -> Logits | None:
        """Runs the model over new tokens, whose keys and values join the cache.

        Args:
            ids: `[B, S]` tokens.
            real: `[B, S]`, False for pads; None where all are real.
            prompt_end: where the prompt ends, in slots of this cache (the formula's N).
            want_logits: whether the logits are needed.

        Returns:
            Logits `[B, vocabulary]` of each row's last token, or None.
        """
        self.reserve(self.length + ids.shape[1])
        step = fixed_length(self._manifest.inputs) or max(1, ids.shape[1])
        logits: Logits | None = None
        for begin in range(0, ids.shape[1], step):
            part = slice(begin, begin + step)
            is_last = begin + step >= ids.shape[1]
            some = None if real is None else real[:, part]
            logits = self._extend(ids[:, part], some, prompt_end, want_logits and is_last)
        return logits

    def _extend(
        self, ids: IntArray, real: NDArray[np.bool_] | None, prompt_end: int, want_logits: bool
    ) -> Logits | None:
        start, end = self.length, self.length + ids.shape[1]
        self._mask[:, start:end] = 1 if real is None else real
        new = self._mask[:, start:end]
        positions = np.maximum(self._tokens[:, None] + np.cumsum(new, axis=1) - 1, 0)
        call = Call(ids, self._mask[:, :end], positions, prompt_end, last_logits_only=True)
        assert self._device is not None  # reserve() opened it
        logits = self._device.step(call, want_logits)
        self.length = end
        self._tokens += new.sum(axis=1)
        return logits
