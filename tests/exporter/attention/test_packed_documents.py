"""Documents packed into one row are seen; what else a mask does with a 2 is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from trianglemix.exporter.attention import far_calls
from trianglemix.exporter.attention.attention_probe import CallSizes
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.attention.packed_documents import check_documents
from trianglemix.exporter.errors import RefusedError

from tests.end_to_end.odd_interfaces import Interface
from tests.exporter.exports import export_to

Array = NDArray[Any]
Scores = Callable[[Array, Array], Array]
"""What is added to scores `[T, T]`, by attention_mask `[T]` and positions `[T]`."""
LEAST: Final = np.finfo(np.float32).min
SLOTS: Final = np.arange(1 << 12)


def _hidden_where(hidden: Array, size: float = LEAST) -> Array:
    return np.where(hidden, np.float32(size), np.float32(0))


def _causal(count: int) -> Array:
    i = SLOTS[:count]
    return i[None] > i[:, None]


def _visible(scores: Scores) -> Callable[[CallSizes], Array]:
    def visible(sizes: CallSizes) -> Array:
        mask = np.full(sizes.total, sizes.segments[1], np.float32)
        mask[: sizes.half] = sizes.segments[0]
        # only prompts have the positions of all keys
        positions = sizes.positions()[0] if sizes.past == 0 else SLOTS[: sizes.total]
        with np.errstate(all="ignore"):
            added = scores(mask, positions).astype(np.float32)
            weights = np.exp(added - added.max(-1, keepdims=True))
        return (weights > 0)[None, None, -sizes.length :]

    return visible


DOCUMENTS: Final[dict[str, Scores]] = {
    "equal": lambda m, p: _hidden_where((m != m[:, None]) | _causal(len(m))),
    "equal, no pads": lambda m, p: _hidden_where((m != m[:, None]) | (m == 0) | _causal(len(m))),
    "those before": lambda m, p: _hidden_where((m > m[:, None]) | _causal(len(m))),
    "those after": lambda m, p: _hidden_where((m < m[:, None]) | _causal(len(m))),
    "difference": lambda m, p: np.abs(m - m[:, None]) * -1e9 + _hidden_where(_causal(len(m))),
    "starts of positions": lambda m, p: _hidden_where(
        (np.cumsum(p == 0) != np.cumsum(p == 0)[:, None]) | _causal(len(m))
    ),
}
OTHERS: Final[dict[str, Scores]] = {
    "as bool": lambda m, p: _hidden_where((m == 0) | _causal(len(m))),
    "only 1 is real": lambda m, p: _hidden_where((m != 1) | _causal(len(m))),
    "times the least": lambda m, p: np.maximum(
        (1 - m) * LEAST + _hidden_where(_causal(len(m))), LEAST
    ),
    "times the least, then causal": lambda m, p: np.where(_causal(len(m)), LEAST, (1 - m) * LEAST),
    "times infinity": lambda m, p: (1 - m) * -np.inf + _hidden_where(_causal(len(m))),
    "times 10000": lambda m, p: (1 - m) * -1e4 + _hidden_where(_causal(len(m)), -1e4),
    "logarithm": lambda m, p: np.log(m) + _hidden_where(_causal(len(m))),
    "product": lambda m, p: (1 - m * m[:, None]) * LEAST + _hidden_where(_causal(len(m))),
    "product is 1": lambda m, p: _hidden_where((m * m[:, None] != 1) | _causal(len(m))),
    "product, 10000": lambda m, p: (1 - m * m[:, None]) * -1e4 + _hidden_where(_causal(len(m))),
    "causal by positions": lambda m, p: _hidden_where((p > p[:, None]) | (m == 0)),
    "slots by positions": lambda m, p: _hidden_where((SLOTS[: len(m)] > p[:, None]) | (m == 0)),
    "counted": lambda m, p: _hidden_where(np.cumsum(m) > np.cumsum(m)[:, None]),
}  # fmt: skip
CALLS: Final = far_calls.packed(None, 1000, has_past=True)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_seen(name: str) -> None:
    with pytest.raises(CutError, match="parts documents by"):
        check_documents(_visible(DOCUMENTS[name]), CALLS)


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_key_is_worth_is_the_sources_own_business(name: str) -> None:
    check_documents(_visible(OTHERS[name]), CALLS)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 100, 5000])
def test_windows_are_no_documents(window: int) -> None:
    """Nor where they are counted by attention_mask."""

    def by_slots(mask: Array, positions: Array) -> Array:
        distance = SLOTS[: len(mask), None] - SLOTS[None, : len(mask)]
        return _hidden_where((distance < 0) | (distance >= window))

    def counted(mask: Array, positions: Array) -> Array:
        distance = np.cumsum(mask)[:, None] - np.cumsum(mask)
        return _hidden_where((distance < 0) | (distance >= window))

    calls = far_calls.packed(window, 4096, has_past=True)
    assert calls or window == 1
    for scores in (by_slots, counted):
        check_documents(_visible(scores), calls)


@pytest.mark.parametrize("mask", ["segments", "later_segments"])
@pytest.mark.parametrize("cache", ["BHTD", "none"])
@pytest.mark.parametrize("spelling", ["softmax", "attention"])
def test_a_source_with_documents(mask: str, cache: str, spelling: str, tmp_path: Path) -> None:
    node = {"spelling": "attention", "opset": 23, "repeat": "inside"}
    choices = {"mask": mask, "cache": cache, "window_layers": (1,), "mask_dtype": "int32"}
    interface = Interface(choices | (node if spelling == "attention" else {}))
    with pytest.raises(RefusedError, match=r"numbers in attention_mask: with .* row 15 does not"):
        export_to(interface.write(tmp_path / "model.onnx"), tmp_path / "out", layers=(0,))
