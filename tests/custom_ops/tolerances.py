"""How far a kernel may be from the reference, by dtype; the comparison says where it is."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TOLERANCES: Final = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest error as a share of the largest reference value, on unit-normal inputs."""
BANDS: Final = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-3}
"""How far, as a share, block sums and the mass they reach may be off where blocks are chosen."""


def assert_close(actual: Array, expected: Array, dtype: str, what: str = "output") -> None:
    """`max|actual - expected| <= TOLERANCES[dtype] * max|expected|`, NaN nowhere.

    A failure prints the first bad index, both values, and how many are bad.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} for {expected.shape}"
    if expected.size == 0:
        return
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    limit = TOLERANCES[dtype] * np.abs(expected).max()
    bad = ~(np.abs(actual - expected) <= limit)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what} differs first at {first}: {actual[first]!r} for {expected[first]!r} "
            f"(allowed {limit:.3g}); {int(bad.sum())} of {bad.size} values are bad"
        )


def assert_same_bits(actual: Array, expected: Array, what: str) -> None:
    """Equal bit by bit, so that NaN equals itself; a failure prints the first bad index."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} for {expected.shape}"
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    bad = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what} differs first at {first}: {actual[first]!r} for {expected[first]!r}; "
            f"{int(bad.sum())} of {bad.size} values are bad"
        )
