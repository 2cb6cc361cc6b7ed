"""The Ascend operator's tiles: every kept pair once, within a core's memories."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trianglemix.custom_ops.reference import start_position
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep

from tests.custom_ops.ascend_operator import MEMORIES, compile_library
from tests.custom_ops.cases import patterns

FUNCTIONS: Final = Path(__file__).parent / "ascend" / "tile_functions.cc"
BUDGETS_910B: Final = (192, 512, 64, 64, 128)
"""KiB of `MEMORIES`, from the chip's documents: not the sources' own figures."""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = ctypes.CDLL(
        str(compile_library(FUNCTIONS, tmp_path_factory.mktemp("tiles") / "tiles.so"))
    )
    library.ascend_visits.restype = library.ascend_memories.restype = ctypes.c_char_p
    return library


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, ...]:
    """S, L, N, first_valid, P, T of one row: prompts, chunks, decode steps, pads on both sides."""
    length = draw(st.integers(1, 3) | st.integers(1, 400))
    end = draw(st.just(length) | st.integers(1, length) | st.integers(length, 900))
    past = draw(st.integers(start_position(end, length), end + 5))
    prompt = draw(st.just(end) | st.integers(0, end) | st.integers(end, end + 300))
    first_valid = draw(st.just(0) | st.integers(0, end))
    return length, end, prompt, first_valid, past, max(past, end)


GROUPS = st.sampled_from([1, 2, 3, 5, 7, 8, 16, 64])


@settings(max_examples=60, deadline=None)
@given(calls(), patterns(400), GROUPS, st.sampled_from([64, 128, 144, 256]))
def test_tiles_visit_every_kept_pair_once(
    tiles: Any, call: tuple[int, ...], pattern: TrianglePattern, group: int, value_size: int
) -> None:
    length, end, prompt, first_valid, past, slots = call
    visits = np.zeros((length, slots), np.int64)
    numbers = (
        length, end, prompt, first_valid, pattern.num_sink_tokens, pattern.sliding_window_size,
        pattern.num_last_tokens, past, slots, group, value_size,
    )  # fmt: skip
    said = tiles.ascend_visits(
        (ctypes.c_int64 * len(numbers))(*numbers), visits.ctypes.data_as(ctypes.c_void_p)
    )
    assert said is None, said
    position = start_position(end, length) + np.arange(length)[:, None]
    kept = keep(position, np.arange(slots)[None, :], pattern, prompt, first_valid)
    expected = kept & (position < end)
    assert (visits == expected).all(), np.argwhere(visits != expected)[0]


@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), st.integers(1, 50))
def test_every_item_has_one_core(tiles: Any, items: list[int], cores: int) -> None:
    owners = np.zeros(sum(items) + 1, np.int64)
    tiles.ascend_owners(
        (ctypes.c_int64 * len(items))(*items),
        ctypes.c_int64(len(items)),
        ctypes.c_int64(cores),
        owners.ctypes.data_as(ctypes.c_void_p),
    )
    assert (owners[:-1] == 1).all()


def test_every_tile_fits_a_910b(tiles: Any) -> None:
    """All head sizes that are taken, and the most heads to a key head."""
    for head_size in range(16, 257, 16):
        for value_size in range(16, 257, 16):
            for group in (1, 7, 64):
                taken = (ctypes.c_int64 * (len(MEMORIES) + 1))()
                sizes = (ctypes.c_int64(size) for size in (group, head_size, value_size))
                said = tiles.ascend_memories(*sizes, taken)
                assert said is None, (head_size, value_size, group, said)
                for name, used, kib in zip(MEMORIES, taken, BUDGETS_910B, strict=False):
                    assert 0 < used <= kib * 1024, (name, head_size, value_size, group)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 40, 64), "a head size is 40, but must be a multiple of 16"),
        ((1, 272, 64), "a head size is 272"),
        ((1, 64, 8), "a head size is 8"),
        ((129, 64, 128), "129 query heads share a key head, but at most 128"),
        ((65, 64, 144), "65 query heads share a key head, but at most 64"),
        ((300, 256, 128), "the heads of a token are 76800 elements wide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tiles: Any, sizes: tuple[int, int, int], words: str
) -> None:
    said = tiles.ascend_memories(
        *(ctypes.c_int64(size) for size in sizes), (ctypes.c_int64 * (len(MEMORIES) + 1))()
    )
    assert said is not None
    assert words in said.decode()
