"""What a configuration says is read as transformers reads it: windows by layer, rotary factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trianglemix.exporter.configuration.rotary_factors import rotaries
from trianglemix.exporter.sources.model_config import LayerAttention, layer_attention

BASE: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "vocab_size": 64,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2 on": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 3},
    "qwen2 off": {"use_sliding_window": False, "sliding_window": 40, "max_window_layers": 3},
    "qwen3 on": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 5},
    "qwen3_moe": {"use_sliding_window": False, "sliding_window": 40},
    "smollm3": {"use_sliding_window": False, "sliding_window": 40},
    "gemma2": {"sliding_window": 40},
    "gemma3_text": {"sliding_window": 40, "sliding_window_pattern": 3},
    "cohere2": {"sliding_window": 40},
    "gpt_oss": {"sliding_window": 40},
    "exaone4": {"sliding_window": 40, "sliding_window_pattern": 4},
    "olmo3": {"sliding_window": 40},
    "llama4_text": {"attention_chunk_size": 64},
    "llama": {},
}


def _theirs(family: str, settings: dict[str, Any], count: int) -> Any:
    from transformers import AutoConfig

    given = {**BASE, **settings, "num_hidden_layers": count}
    return AutoConfig.for_model(family.split()[0], **given)


def _expected(config: Any, count: int) -> tuple[LayerAttention, ...]:
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    window, chunk = (
        config.to_dict().get("sliding_window"),
        getattr(config, "attention_chunk_size", None),
    )
    kinds = {
        "full_attention": LayerAttention(),
        "sliding_attention": LayerAttention(window),
        "chunked_attention": LayerAttention(chunk=chunk),
    }
    return tuple(kinds[kind] for kind in types)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_by_layer(family: str) -> None:
    count, settings = 12, FAMILIES[family]
    config = _theirs(family, settings, count)
    expected = _expected(config, count)
    assert layer_attention(config.to_dict(), count) == expected
    older = {**BASE, **settings, "model_type": family.split()[0], "num_hidden_layers": count}
    if family == "llama4_text":
        older["no_rope_layers"] = config.no_rope_layers
    assert layer_attention(older, count) == expected  # as files were before layer_types


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "starcoder2"])
def test_families_whose_every_layer_slides(family: str) -> None:
    config = {"model_type": family, "sliding_window": 40}
    assert layer_attention(config, 3) == (LayerAttention(40),) * 3
    assert layer_attention({**config, "sliding_window": None}, 3) == (LayerAttention(),) * 3


def test_what_is_not_known_is_not_claimed() -> None:
    assert layer_attention({"model_type": "new", "sliding_window": 40}, 3) is None
    assert layer_attention({"model_type": "llama"}, None) is None
    letters = {"model_type": "exaone4", "sliding_window": 40, "sliding_window_pattern": "LLLG"}
    assert layer_attention(letters, 4) == (*(LayerAttention(40),) * 3, LayerAttention())
    neo = {"attention_layers": ["global", "local"], "window_size": 256}
    assert layer_attention(neo, 2) == (LayerAttention(), LayerAttention(256))
    assert layer_attention({"model_type": "recurrent_gemma", "attention_window_size": 8}, 3) is None
    mixed = {"layer_types": ["conv", "full_attention", "sliding_attention"], "sliding_window": 8}
    assert layer_attention(mixed, 3) == (LayerAttention(), LayerAttention(8))


LONG = {
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 512,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn with betas": {
        "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 128,
    },
    "yarn with mscale": {
        "factor": 40.0, "mscale": 0.8, "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 512,
    },
    "yarn with a factor": {
        "factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 512,
    },
    "longrope": LONG,
    "longrope with a factor": {**LONG, "attention_factor": 1.25},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "type", "rope_parameters"])
def test_rotary_factors_are_transformers(kind: str, spelling: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = kind.split()[0]
    scaling = {"rope_type": rope_type, **SCALINGS[kind]}
    theirs = LlamaConfig(**{**BASE, "rope_scaling": {**scaling}})
    if spelling == "rope_parameters":
        config = {**BASE, "rope_parameters": {**scaling, "rope_theta": BASE["rope_theta"]}}
        del config["rope_theta"]
    else:
        if spelling == "type":
            scaling["type"] = scaling.pop("rope_type")
        config = {**BASE, "rope_scaling": scaling}
    (ours,) = rotaries(config, 16)
    short, magnitude = ROPE_INIT_FUNCTIONS[rope_type](theirs, None)
    np.testing.assert_allclose(ours.scaled, short, rtol=1e-5)
    assert ours.magnitude == pytest.approx(magnitude)
    if ours.long is not None:
        long, _ = ROPE_INIT_FUNCTIONS[rope_type](theirs, None, seq_len=513)
        np.testing.assert_allclose(ours.long, long, rtol=1e-5)
        assert ours.switch == 512


def test_other_ways_to_say_it() -> None:
    assert rotaries({"model_type": "gpt2"}, 16) == []
    (plain,) = rotaries({"rope_theta": 500.0, "partial_rotary_factor": 0.5}, 16)
    assert plain.is_plain
    np.testing.assert_allclose(plain.plain, 500.0 ** -(np.arange(0, 8, 2) / 8))
    (unknown,) = [rotaries({"rope_theta": 5.0, "rope_scaling": {"type": "new"}}, 16)]
    assert unknown == []
    linear = {"type": "linear", "factor": 8.0}
    gemma = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear}
    full, windowed = rotaries(gemma, 16)
    assert (full.kind, windowed.kind) == ("linear", "default")
    nested = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
              "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    again = rotaries({"rope_parameters": nested}, 16)
    for one, other in zip((full, windowed), again, strict=True):
        np.testing.assert_array_equal(one.scaled, other.scaled)
