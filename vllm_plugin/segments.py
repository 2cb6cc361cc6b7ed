"""The segments of a step as tensors: made once a step, read by every layer of a role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from trianglemix.vllm.row_split import Segment


@dataclass(frozen=True)
class Rows:
    """Which rows of the step: a slice where they lie together, else their numbers."""

    place: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """`x[rows]`: a view where the rows lie together."""
        return x[self.place]

    def target(self, x: Tensor) -> Tensor:
        """Where results for the rows of `x` may be written; `put` then brings them home."""
        return x[self.place] if isinstance(self.place, slice) else torch.empty_like(x[self.place])

    def put(self, x: Tensor, result: Tensor) -> None:
        """`x[rows] = result`, unless `result` is that view already."""
        if not isinstance(self.place, slice):
            x[self.place] = result


@dataclass(frozen=True)
class SegmentTensors:
    """Segments on a device: `starts [n + 1]`, `keys [n]`, `table [n, pages]`, all int32.

    `starts_cpu` are the same starts on the CPU.

    Rows `starts[s]` to `starts[s + 1] - 1` of the taken rows are segment s, whose keys are the
    first `keys[s]` tokens of the pages `table[s]`.
    """

    segments: tuple[Segment, ...]
    rows: Rows
    starts: Tensor
    starts_cpu: Tensor
    keys: Tensor
    table: Tensor
    longest_rows: int
    longest_keys: int

    @property
    def count(self) -> int:
        """How many segments."""
        return len(self.segments)


def segment_tensors(
    segments: Sequence[Segment], table: Tensor, device_tokens: Tensor | None = None
) -> SegmentTensors:
    """The segments of a step whose requests' pages are `table [requests, pages]`.

    `device_tokens [requests]` replaces the keys of segments that end at their request's newest
    token: where several tokens are guessed ahead, only the device knows how many a request has.
    """
    device = table.device
    starts = [0, *accumulate(segment.rows for segment in segments)]
    keys = _integers([segment.keys for segment in segments], device)
    requests = [segment.request for segment in segments]
    if len(requests) == 1:
        pages = table[requests[0] : requests[0] + 1]
    else:
        pages = table[_integers(requests, device, torch.int64)]
    if device_tokens is not None:
        newest = _integers([segment.is_newest for segment in segments], device, torch.bool)
        known = device_tokens[_integers(requests, device, torch.int64)]
        keys = torch.where(newest, known.to(keys.dtype), keys)
    return SegmentTensors(
        tuple(segments), Rows(_place(segments, device)), _integers(starts, device),
        torch.tensor(starts, dtype=torch.int32), keys, pages,
        max(segment.rows for segment in segments), max(segment.keys for segment in segments),
    )  # fmt: skip


def _place(segments: Sequence[Segment], device: torch.device) -> slice | Tensor:
    if all(one.end == other.begin for one, other in pairwise(segments)):
        return slice(segments[0].begin, segments[-1].end)
    rows = [torch.arange(segment.begin, segment.end) for segment in segments]
    return _to(torch.cat(rows), device)


def _integers(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    return _to(torch.tensor(values, dtype=dtype), device)


def _to(host: Tensor, device: torch.device) -> Tensor:
    """Copied without waiting for the device."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
