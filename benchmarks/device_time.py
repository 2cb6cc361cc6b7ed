"""Device time of GPU work, kernel by kernel, as the profiler records it; and memory in use."""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


def kernel_times(run: Run, repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Milliseconds on the device of one `run`, by kernel name.

    A kernel's time is its median over the repeats, times how often a run launches it. Copies and
    fills count too.
    """
    for _ in range(warm_up):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    samples = dict[str, list[float]]()
    for event in recorded.events() or []:
        if str(event.device_type).endswith("CUDA"):
            samples.setdefault(event.name, []).append(event.device_time / 1e3)
    return {name: statistics.median(t) * len(t) / repeats for name, t in samples.items()}


def event_time(run: Run, repeats: int, warm_up: int = 2) -> float:
    """Median milliseconds of one `run` between events of the current stream, launches chained."""
    for _ in range(warm_up):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(marks)
    return statistics.median(first.elapsed_time(second) for first, second in pairs)


@dataclass
class PeakMemory:
    """Highest device memory in use (bytes, all processes) while the context is open."""

    interval: float = 0.002
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)
