"""The reference card's objects as sections of --additional-config."""

from __future__ import annotations

import pytest
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.exporter.layers.plan import Fingerprint
from trianglemix.pytorch import TriangleMixConfig, TriangleMixInferenceConfig
from trianglemix.vllm import additional_config
from trianglemix.vllm.config import is_enabled, read_config


def test_the_card_s_preset_is_served_as_it_is_patched() -> None:
    card = TriangleMixInferenceConfig.for_qwen3("14B")
    section = additional_config(card, 40)
    config = read_config(section, Fingerprint(40, 40, 8, 128))
    plain = card.to_trianglemix_config()
    assert plain is not None
    assert config.layers == set(plain.triangle_layers(40)) == set(range(28, 40))
    assert config.pattern == plain.pattern
    assert is_enabled(section, {})


def test_a_preset_that_is_switched_off() -> None:
    assert not is_enabled(
        additional_config(TriangleMixInferenceConfig(enable_trianglemix=False), 4), {}
    )


def test_layers_that_the_model_has_not() -> None:
    with pytest.raises(ConfigurationError, match="has not"):
        additional_config(TriangleMixConfig(triangle_layer_indices=[4]), 4)


def test_block_sparse_layers_are_not_dropped_silently() -> None:
    config = TriangleMixConfig(triangle_layer_indices=[1], block_sparse_layer_indices=[2])
    with pytest.raises(ConfigurationError, match="triangle layers only"):
        additional_config(config, 4)
