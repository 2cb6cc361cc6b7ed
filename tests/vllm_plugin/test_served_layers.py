"""Which layers are taken, and what is refused by name before a prompt is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.served_layers import count_board, layer_index

from tests.vllm_plugin.test_step import Builder, FullAttentionSpec, builder_of, engine

PATTERN = TrianglePattern(4, 16, 8)
NAME = "model.layers.1.self_attn.attn"


@pytest.mark.parametrize(
    ("name", "index"),
    [
        (NAME, 1),
        ("language_model.model.layers.35.self_attn.attn", 35),
        ("model.decoder.layers.0.attn", 0),
        ("h.7", 7),
        ("draft_model.model.layers.1.self_attn.attn", None),
        ("model.layers.1.experts.2.attn", None),
        ("model.layers1.attn", None),
        ("model.attn", None),
    ],
)
def test_layers_are_numbered_by_their_names(name: str, index: int | None) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_type": "encoder_only"}, "type encoder_only"),
        ({"sliding_window": (4095, 0)}, "window of its own"),
        ({"sliding_window": 4096}, "window of its own"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sinks": [0.5]}, "sinks in its softmax"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "cache is quantised"),
        ({"refusal": lambda role, spec: f"no kernel for {role}"}, "no kernel for triangle"),
    ],
)
def test_an_attention_that_is_not_plain(changes: dict[str, Any], words: str) -> None:
    config = engine(PATTERN)
    for name, value in changes.items():
        setattr(config.compilation_config.static_forward_context[NAME].impl, name, value)
    with pytest.raises(ServingError, match=words) as caught:
        builder_of(config)
    assert NAME in str(caught.value)
    assert builder_of_other_layers(changes)


def builder_of_other_layers(changes: dict[str, Any]) -> Builder:
    """A layer that is no triangle layer may be anything."""
    config = engine(PATTERN, "0,2")
    for name, value in changes.items():
        setattr(config.compilation_config.static_forward_context[NAME].impl, name, value)
    return builder_of(config)


@pytest.mark.parametrize(("window", "kind"), [(9, "FullAttentionSpec"), (None, "Strange")])
def test_a_cache_that_is_not_plain(window: int | None, kind: str) -> None:
    spec = type(kind, (), {"sliding_window": window})()
    with pytest.raises(ServingError, match="window of its own" if window else "kind Strange"):
        Builder(spec, [NAME], engine(PATTERN), None)


def test_a_role_that_its_kernels_do_not_take() -> None:
    """Asked by role: the same layer may be a triangle layer."""
    for keeps, refused in ((BlockRule(), True), (PATTERN, False)):
        config = engine(keeps)
        attention = config.compilation_config.static_forward_context[NAME].impl
        attention.refusal = lambda role, spec: "no library" if role == "block_sparse" else None
        if refused:
            with pytest.raises(ServingError, match="cannot be a block-sparse layer: no library"):
                builder_of(config)
        else:
            assert builder_of(config)


def test_another_backend() -> None:
    config = engine(PATTERN)
    config.compilation_config.static_forward_context[NAME].impl = SimpleNamespace()
    with pytest.raises(ServingError, match="vLLM runs it by SimpleNamespace"):
        builder_of(config)


def test_a_layer_without_attention() -> None:
    config = engine(PATTERN)
    del config.compilation_config.static_forward_context[NAME]
    with pytest.raises(ServingError, match="layer 1 is named as a triangle layer"):
        builder_of(config)
    config = engine(BlockRule())
    del config.compilation_config.static_forward_context[NAME]
    with pytest.raises(ServingError, match="layer 1 is named as a block-sparse layer"):
        builder_of(config)


def test_a_stage_of_a_pipeline_has_its_own_layers() -> None:
    config = engine(PATTERN, "0-2")
    modules = config.compilation_config.static_forward_context
    for number in (0, 1):
        del modules[f"model.layers.{number}.self_attn.attn"]
    config.model_config.get_layers_start_end_indices = lambda parallel: (2, 3)
    assert [layer.index for layer in builder_of(config)._layers] == [2]


def test_layers_of_two_caches_are_prepared_one_after_the_other() -> None:
    config = engine(PATTERN, "0-2")
    names = list(config.compilation_config.static_forward_context)
    first = Builder(FullAttentionSpec(), names[:1], config, None)
    second = Builder(FullAttentionSpec(), names[1:], config, None)
    assert [layer.index for layer in (*first._layers, *second._layers)] == [0, 1, 2]


def test_only_the_first_rank_of_a_group_keeps_a_file() -> None:
    parallel = SimpleNamespace(rank=2, tensor_parallel_size=2)
    config = SimpleNamespace(parallel_config=parallel, instance_id="x")
    assert count_board(config).folder is not None
    parallel.rank = 3
    assert count_board(config).folder is None
