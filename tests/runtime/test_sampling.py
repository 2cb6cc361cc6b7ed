"""Sampling draws from the distribution it was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from trianglemix.runtime import Sampling
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.sampling import Sampler

LOGITS = np.array([[0.0, 3.0, 1.0, 2.0, -1.0]], np.float32)


def _draws(sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Frequencies `[5]` of the tokens drawn from LOGITS."""
    sampler = Sampler(sampling, range(1))
    drawn = [int(sampler.choose(LOGITS)[0]) for _ in range(count)]
    return np.bincount(drawn, minlength=LOGITS.shape[1]) / count


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_greedy_takes_the_likeliest() -> None:
    logits = np.concatenate([LOGITS, LOGITS[:, ::-1]])
    assert Sampler(Sampling(), range(2)).choose(logits).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    found = _draws(Sampling(temperature, seed=1))
    np.testing.assert_allclose(found, _softmax(LOGITS[0] / temperature), atol=0.03)


def test_top_k_keeps_the_k_likeliest() -> None:
    found = _draws(Sampling(1.0, top_k=2, seed=2))
    expected = np.zeros(5)
    expected[[1, 3]] = _softmax(LOGITS[0, [1, 3]])
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # softmax: 0.64 for token 1, 0.23 for 3, 0.086 for 2
    assert np.flatnonzero(_draws(Sampling(1.0, top_p=0.5, seed=3))).tolist() == [1]
    assert np.flatnonzero(_draws(Sampling(1.0, top_p=0.7, seed=3))).tolist() == [1, 3]
    found = _draws(Sampling(1.0, top_p=0.9, seed=3))
    expected = np.zeros(5)
    expected[[1, 2, 3]] = _softmax(LOGITS[0, [1, 2, 3]])
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_seeds_repeat_and_differ() -> None:
    def drawn(seed: int | None, row: int = 0) -> list[int]:
        sampler = Sampler(Sampling(2.0, seed=seed), range(row, row + 1))
        return [int(sampler.choose(LOGITS)[0]) for _ in range(40)]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert drawn(7, row=1) == drawn(8)  # what makes a row of a batch repeatable alone
    assert drawn(None) != drawn(None)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": np.inf}, "temperature is inf, but must be a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_out_of_range(values: dict[str, float], name: str) -> None:
    with pytest.raises(PromptError, match=name):
        Sampling(**values)
