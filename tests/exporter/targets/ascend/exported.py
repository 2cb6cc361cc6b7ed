"""Tiny models exported for Ascend and for the CPU with the same triangle layers, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from trianglemix.exporter.attention.sites import Sites
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.runtime.backends.backend import Logits
from trianglemix.runtime.session import TriangleSession

from tests.tiny_models import tiny_model

LAST, CHUNK, SLOTS = 16, 32, 256
PATTERN = PatternRequest(sink=4, window=24, last=LAST)
TRIANGLE = LayerRequest(layers=(1, 2))


class Silent:
    """An observer that hears and says nothing."""

    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Sites) -> None: ...


@dataclass(frozen=True)
class Pair:
    """The same source exported twice."""

    ascend: Path
    cpu: Path
    report: ExportReport


def export_ascend(
    source: Path,
    output: Path,
    request: AscendRequest | None = None,
    layers: LayerRequest = TRIANGLE,
) -> ExportReport:
    request = request or AscendRequest(chunk=CHUNK, max_length=SLOTS)
    options = ExportOptions(
        source, output, target="ascend", layers=layers, pattern=PATTERN, settings=request
    )
    return export(options, Silent())


def export_pair(source: Path, folder: Path, layers: LayerRequest = TRIANGLE) -> Pair:
    report = export_ascend(source, folder / "ascend", layers=layers)
    options = ExportOptions(source, folder / "cpu", layers=layers, pattern=PATTERN, weights="copy")
    export(options, Silent())
    return Pair(folder / "ascend", folder / "cpu", report)


def tiny_source(family: str = "llama", route: str = "gqa") -> Path:
    return tiny_model(family, route).path


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 250, length)]


def last_logits(session: TriangleSession, ids: list[int], chunk: int | None = None) -> Logits:
    """Logits after a prompt, read in steps of `chunk` tokens."""
    cache = session.new_cache()
    logits: Logits | None = None
    for begin in range(0, len(ids), chunk or len(ids)):
        part = np.array([ids[begin : begin + (chunk or len(ids))]])
        logits = cache.extend(part, None, len(ids), want_logits=begin + part.shape[1] == len(ids))
    assert logits is not None
    return logits
