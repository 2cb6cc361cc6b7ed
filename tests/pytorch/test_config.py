"""The configuration: ranges, layers, presets, and every row of the spelling table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.pattern import keep_mask
from trianglemix.pytorch.config import TriangleMixConfig
from trianglemix.pytorch.inference_config import TriangleMixInferenceConfig

LENGTHS = st.integers(1, 120)
SMALL = st.integers(1, 40)


def _grid(length: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column indices counted from `first`, as a formula on paper counts them."""
    index = np.arange(first, length + first)
    return index[:, None], index[None, :]


@given(LENGTHS, SMALL, SMALL, SMALL)
def test_minference_spelling(length: int, n_init: int, n_local: int, last_n: int) -> None:
    i, j = _grid(length, 0)
    theirs = (j <= i) & ((j < n_init) | (i - j < n_local) | (i >= length - last_n))
    ours = TriangleMixConfig.from_minference(n_init, n_local, last_n, starting_layer=16)
    np.testing.assert_array_equal(keep_mask(length, ours.pattern), theirs)
    assert ours.triangle_layers(32) == tuple(range(16, 32))


def _paper_formula(i: Any, j: Any, length: int, si: int, sl: int, last: int) -> np.ndarray:
    streaming = (i >= j) & ((j <= si) | (i - j <= sl))
    last_rows = (i >= j) & (length - i < last) & (j > si) & (i - j > sl)
    kept: np.ndarray = streaming | last_rows
    return kept


@given(LENGTHS, SMALL, SMALL, SMALL)
def test_paper_spelling(length: int, si: int, sl: int, last: int) -> None:
    i, j = _grid(length, 1)
    ours = TriangleMixConfig.from_paper(si, sl, last, starting_layer=0)
    np.testing.assert_array_equal(
        keep_mask(length, ours.pattern), _paper_formula(i, j, length, si, sl, last)
    )


@given(LENGTHS, SMALL, SMALL, st.integers(2, 40))
def test_reference_card_spelling(length: int, si: int, sl: int, last: int) -> None:
    i, j = _grid(length, 0)
    ours = TriangleMixConfig.from_reference_card(si, sl, last, [1, 2])
    np.testing.assert_array_equal(
        keep_mask(length, ours.pattern), _paper_formula(i, j, length, si, sl, last)
    )


@given(LENGTHS, SMALL, SMALL, SMALL)
def test_vllm_ascend_spelling(length: int, sink: int, window: int, tail: int) -> None:
    i, j = _grid(length, 0)
    theirs = (j <= i) & ((j < sink) | (j >= i - window) | (i >= length - tail))
    ours = TriangleMixConfig.from_vllm_ascend(sink, window, tail)
    np.testing.assert_array_equal(keep_mask(length, ours.pattern), theirs)


def test_number_of_layers_means_the_deepest() -> None:
    assert TriangleMixConfig(num_triangle_layers=3).triangle_layers(10) == (7, 8, 9)
    assert TriangleMixConfig(starting_layer=7).triangle_layers(10) == (7, 8, 9)
    assert TriangleMixConfig(triangle_layer_indices=[9, 2]).triangle_layers(10) == (2, 9)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_sink_tokens": -1}, "-1"),
        ({"sliding_window_size": 0}, "0"),
        ({"num_last_tokens": 0}, "0"),
        ({"num_triangle_layers": -2}, "-2"),
        ({"triangle_layer_indices": [3, 3]}, "[3, 3]"),
        ({"triangle_layer_indices": [-1]}, "-1"),
        ({"triangle_layer_indices": [1.5]}, "is 1.5, but must be a whole number"),
        ({"block_sparse_layer_indices": ["1"]}, "is '1', but must be a whole number"),
        ({"block_sparse_layer_indices": [True]}, "is True, but must be a whole number"),
        ({"num_triangle_layers": 2, "starting_layer": 1}, "starting_layer"),
    ],
)
def test_bad_values_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=r".") as caught:
        TriangleMixConfig(**settings)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        TriangleMixConfig(),
        TriangleMixConfig(num_triangle_layers=11),
        TriangleMixConfig(triangle_layer_indices=[10]),
    ],
)
def test_layers_that_do_not_fit_are_refused(config: TriangleMixConfig) -> None:
    with pytest.raises(ConfigurationError):
        config.triangle_layers(10)


def test_presets_give_the_masks_of_the_card() -> None:
    card = {"14B": (12, 40), "32B": (16, 64)}
    for size, (count, num_layers) in card.items():
        config = TriangleMixInferenceConfig.for_qwen3(model_size=size).to_trianglemix_config()
        assert config is not None
        assert config.triangle_layers(num_layers) == tuple(range(num_layers - count, num_layers))
        i, j = _grid(200, 0)
        np.testing.assert_array_equal(
            keep_mask(200, config.pattern), _paper_formula(i, j, 200, 4, 32, 64)
        )
    long = TriangleMixInferenceConfig.for_long_sequence().to_trianglemix_config()
    assert long is not None
    i, j = _grid(400, 0)
    np.testing.assert_array_equal(
        keep_mask(400, long.pattern), _paper_formula(i, j, 400, 8, 64, 128)
    )
    assert TriangleMixInferenceConfig.for_ascend_npu().use_npu_optimization


def test_a_switched_off_preset_gives_no_configuration() -> None:
    assert TriangleMixInferenceConfig(enable_trianglemix=False).to_trianglemix_config() is None


@pytest.mark.parametrize("size", [32, 65, 256])
def test_npu_block_size_is_checked(size: int) -> None:
    with pytest.raises(ConfigurationError, match=str(size)):
        TriangleMixInferenceConfig(npu_block_size=size)


def test_an_unknown_qwen3_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="8B"):
        TriangleMixInferenceConfig.for_qwen3(model_size="8B")
