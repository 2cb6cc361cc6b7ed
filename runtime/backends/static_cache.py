"""Runs static graphs over one cache: any step of the runtime, cut into the graphs' sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trianglemix.custom_ops.arrays import Array
from trianglemix.manifest.feeds import Call
from trianglemix.manifest.manifest import Manifest
from trianglemix.manifest.static_graphs import StaticGraph, StaticGraphs
from trianglemix.runtime.backends.backend import DeviceCache, Kernel, Logits
from trianglemix.runtime.errors import PromptError


class StaticStore(Protocol):
    """The cache of one sequence where the graphs run."""

    def run(
        self, graph: StaticGraph, small: dict[str, Array], start: int, rows: int
    ) -> Logits | None:
        """Runs a graph; the first `rows` of its new rows join the cache at slot `start`.

        Returns:
            The graph's logits `[1, vocabulary]`, None if it gives none.

        Raises:
            ExecutionError: the runtime failed; the cache then counts as unchanged.
        """


class StaticDevice(Protocol):
    """A device with the graphs loaded."""

    @property
    def provider(self) -> str: ...

    def open_store(self) -> StaticStore:
        """An empty cache: zeros, for a slot that holds no key must hold a finite number."""


@dataclass(frozen=True)
class StaticBackend:
    """A folder of static graphs as a backend of the runtime."""

    device: StaticDevice
    manifest: Manifest

    @property
    def provider(self) -> str:
        """See `Backend.provider`."""
        return self.device.provider

    @property
    def kernel(self) -> Kernel:
        """ "static": attention is spelled out in the graphs; "native" where it is an operator."""
        static = self.manifest.static
        return "native" if static is not None and static.lowering == "custom" else "static"

    def open_cache(self, batch: int, slots: int) -> DeviceCache:
        """See `Backend.open_cache`; the cache has the slots of the graphs, whatever is asked."""
        if batch != 1:
            raise PromptError(f"a batch of {batch} rows, but static graphs take one row at a time")
        cache = StaticCache(self.manifest, self.device.open_store())
        cache.reserve(slots)
        return cache

    def check_memory(self, batch: int, rows: int, keys: int) -> None:
        """A static graph's memory does not depend on the prompt: nothing to refuse."""


class StaticCache:
    """One sequence. Rows before the dense tail stream, the last rows are a tail, one row decodes.

    Pads come on the right of a call and are not stored, so that they never become sinks, never
    stand among the last rows, and causality keeps them from every row.
    """

    def __init__(self, manifest: Manifest, store: StaticStore) -> None:
        assert manifest.static is not None
        self._manifest = manifest
        self._graphs: StaticGraphs = manifest.static
        self._store = store

    def reserve(self, slots: int) -> None:
        """Refuses what the graphs were not made for; there is nothing to enlarge.

        The runtime asks for more than a prompt needs: only a step beyond the slots is an error.
        """

    def step(self, call: Call, want_logits: bool) -> Logits | None:
        """See `DeviceCache.step`.

        Raises:
            PromptError: more tokens than the cache has slots.
        """
        ids = call.ids
        begin, end = call.past, call.past + call.length
        if end > self._graphs.slots:
            raise PromptError(
                f"{end} tokens, but the graphs were made for {self._graphs.slots}; shorten the "
                "prompt, or export with a larger --max-length"
            )
        prompt_end = end if call.prompt_end is None else call.prompt_end
        tail_begin = prompt_end - self._manifest.pattern.num_last_tokens
        logits: Logits | None = None
        for part in self._graphs.parts(begin, end, tail_begin):
            rows = ids[:, part.begin - begin : part.end - begin]
            small = self._graphs.small_feeds(part, self._manifest.input_ids, rows)
            logits = self._store.run(part.graph, small, part.begin, rows.shape[1])
        if want_logits and logits is None:  # the step ended before the tail: nobody asks then
            raise PromptError("logits were asked for in the middle of a prompt; end it first")
        return logits if want_logits else None
