"""The counts of rows in vLLM's metrics: `vllm:trianglemix_rows_total{layer, kind}`."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trianglemix.vllm.counters import read_counts

NAME: Final = "vllm:trianglemix_rows"


class RowCollector:
    """A collector of prometheus_client over the folders of this process's engines.

    vLLM's own registry of several API servers does not ask it: there the log has the counts.
    """

    def __init__(self) -> None:
        self._folders: list[Path] = []

    def watch(self, folder: Path) -> None:
        """Counts an engine's workers too; its folder goes with this process."""
        self._folders.append(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def describe(self) -> list[Any]:
        """Nothing: the layers are known later."""
        return []

    def collect(self) -> Iterator[Any]:
        """prometheus_client's interface."""
        from prometheus_client.core import CounterMetricFamily

        text = "Rows of prompts and answers by what a layer let them see."
        family = CounterMetricFamily(NAME, text, labels=["layer", "kind"])
        for layer, by_kind in sorted(read_counts(self._folders).items()):
            for kind, rows in by_kind.items():
                family.add_metric([str(layer), kind], rows)
        yield family


_COLLECTOR: Final = RowCollector()
_REGISTERED: list[RowCollector] = []


def watch_counts(folder: Path) -> None:
    """Serves the counts of an engine with vLLM's own metrics, from this process."""
    if not _REGISTERED:
        from prometheus_client import REGISTRY

        REGISTRY.register(_COLLECTOR)
        _REGISTERED.append(_COLLECTOR)
    _COLLECTOR.watch(folder)
