"""The reference card's objects as sections of --additional-config."""

from __future__ import annotations

import pytest
from trianglemix.custom_ops.block_sparse.contract import BlockRule
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


def test_block_sparse_layers_are_served_as_they_are_patched() -> None:
    rule = BlockRule(mass=0.9, min_length=2000, num_last_tokens=64)
    config = TriangleMixConfig(
        triangle_layer_indices=[1], block_sparse_layer_indices=[2, 3], block_rule=rule
    )
    served = read_config(additional_config(config, 4), Fingerprint(4, 8, 2, 64))
    assert served.keeps == {1: config.pattern, 2: rule, 3: rule}
    alone = TriangleMixConfig(block_sparse_layer_indices=[2], block_rule=rule)
    assert read_config(additional_config(alone, 4), Fingerprint(4, 8, 2, 64)).keeps == {2: rule}
    with pytest.raises(ConfigurationError, match="named as triangle layers and as block-sparse"):
        additional_config(TriangleMixConfig(starting_layer=2, block_sparse_layer_indices=[2]), 4)
