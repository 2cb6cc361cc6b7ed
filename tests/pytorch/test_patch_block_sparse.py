"""A patched transformers model with block-sparse layers equals the operator's reference."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from trianglemix.custom_ops.block_sparse.reference import BlockSparse, block_sparse_attention
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.reference import Call
from trianglemix.pytorch import (
    AscendTriangleMixAttention,
    BlockRule,
    TriangleMixConfig,
    TriangleMixInferenceConfig,
    TriangleMixMaskGenerator,
    UnsupportedModelError,
    choosing_blocks,
    patch,
    register,
)
from trianglemix.pytorch.block_choice import choose_blocks
from trianglemix.pytorch.kept_shares import KeptShares

from tests.tiny_models import tiny_folder

RULE = BlockRule(mass=0.5, min_length=200, num_last_tokens=8)
CONFIG = TriangleMixConfig(
    4, 24, 8, triangle_layer_indices=[2], block_sparse_layer_indices=[0, 1], block_rule=RULE
)
ONLY = replace(CONFIG, triangle_layer_indices=None)
TOLERANCE = dict(atol=1e-2, rtol=1e-3)
"""Rounding may decide about a block that lies at the threshold."""
GREEDY: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


@lru_cache(maxsize=4)
def _loaded(family: str) -> nn.Module:
    """Sharper queries than random weights give, so that blocks differ in what they hold."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(family)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "q_norm" in name:
                weight.mul_(6)
    loaded: nn.Module = model
    return loaded


def _model(family: str = "llama") -> Any:
    return copy.deepcopy(_loaded(family))


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(11))


def _by_the_reference(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """Whole prompts without pads: the float64 reference in layers 0 and 1, else dense."""
    B, H, N, D = query.shape
    q, k, v = (x.transpose(1, 2).reshape(B, N, -1).numpy() for x in (query, key, value))
    empty = np.zeros((B, key.shape[1], 0, D), np.float32)
    call = Call(q, k, v, empty, empty, np.full(B, N - 1), N)
    rule = RULE if module.layer_idx < 2 else replace(RULE, mass=1.0)
    shape = AttentionShape(H, key.shape[1], D, value.shape[3])
    output = block_sparse_attention(call, BlockSparse(shape, rule, given["scaling"]))[0]
    return torch.from_numpy(output).float().view(B, N, H, -1), None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prefill_equals_the_reference(family: str) -> None:
    ids = _ids(1, 700)
    AttentionInterface.register("rule", _by_the_reference)
    expected, model, dense = _model(family), patch(_model(family), ONLY), _model(family)
    expected.set_attn_implementation("rule")
    with torch.no_grad():
        got = model(ids).logits
        torch.testing.assert_close(got, expected(ids).logits, **TOLERANCE)
        assert (dense(ids).logits - got).abs().max() > 0.1, "no block was dropped"


def test_short_prompts_and_decoding_are_the_models_own() -> None:
    ids = _ids(1, 200)
    tokens = [m.generate(ids, **GREEDY) for m in (_model(), patch(_model(), ONLY))]
    assert torch.equal(*tokens)


def test_chunks_at_tile_edges_give_the_tokens_of_one_pass() -> None:
    model, ids = patch(_model(), CONFIG), _ids(1, 700)
    whole = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prefill_chunk_size=256, **GREEDY), whole)


def test_left_padded_rows_equal_themselves_alone() -> None:
    model, lengths, width = patch(_model(), CONFIG), (600, 431, 90), 600
    ids, mask = _ids(3, width), torch.zeros(3, width, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, width - n :] = 1
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        for b, n in enumerate(lengths):
            alone = model(ids[b : b + 1, width - n :]).logits
            torch.testing.assert_close(batch[b : b + 1, width - n :], alone, **TOLERANCE)


def test_a_saved_model_keeps_its_layers_and_its_rule(tmp_path: Path) -> None:
    model, ids = patch(_model(), CONFIG), _ids(1, 500)
    model.save_pretrained(tmp_path)
    register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="trianglemix")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_layers_tell_their_number_to_a_chooser() -> None:
    model, ids, seen = patch(_model(), CONFIG), _ids(1, 900), []

    def look(layer: int, *given: Any) -> Tensor:
        kept = choose_blocks(*given)
        causal = torch.ones_like(kept).tril()
        seen.append((layer, float(kept.sum() / causal.sum())))
        return kept

    with torch.no_grad(), choosing_blocks(look):
        model.generate(ids, **GREEDY)
    assert [layer for layer, _ in seen] == [0, 1], "decode steps do not ask"
    assert all(0.3 < share < 0.99 for _, share in seen)


def test_kept_shares_are_of_causal_blocks() -> None:
    ids, mask = _ids(2, 900), torch.ones(2, 900, dtype=torch.long)
    mask[1, :200] = 0
    found = []
    for mass in (0.5, 0.9999999):
        model, shares = (
            patch(_model(), replace(ONLY, block_rule=replace(RULE, mass=mass))),
            KeptShares(),
        )
        with torch.no_grad(), shares.watching():
            model(ids, attention_mask=mask)
        found.append(shares.by_layer())
    assert found[1] == pytest.approx({0: 1.0, 1: 1.0})
    assert all(0.2 < share < 0.99 for share in found[0].values())


def test_sliding_layers_and_unknown_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of Gemma2\w+ is sliding_"):
        patch(_model("gemma2"), ONLY)
    for layers, words in (([7], "has layer 7, but the model has 3"), ([2], "layers .2. are named")):
        with pytest.raises(ConfigurationError, match=words):
            patch(_model(), replace(CONFIG, block_sparse_layer_indices=layers))
    for layers, words in (([1, 1], "names a layer twice"), ([-1], "is -1, but must be 0 or more")):
        with pytest.raises(ConfigurationError, match=words):
            TriangleMixConfig(block_sparse_layer_indices=layers)


def test_what_has_no_block_sparse_layers_refuses_them() -> None:
    with pytest.raises(ConfigurationError, match="layer 1 is a block-sparse layer"):
        AscendTriangleMixAttention(4, 16, None, CONFIG, 1, 3)
    assert not AscendTriangleMixAttention(4, 16, None, CONFIG, 2, 3).attention.pattern.is_dense
    with pytest.raises(ConfigurationError, match="depends on queries"):
        TriangleMixMaskGenerator(CONFIG).get_attention_mask(100, 0)
    assert TriangleMixMaskGenerator(CONFIG).get_attention_mask(100, 2).shape == (100, 100)


def test_a_deployments_configuration_hands_them_on() -> None:
    config = TriangleMixInferenceConfig(
        num_triangle_layers=1, block_sparse_layer_indices=[0], block_rule=RULE
    ).to_trianglemix_config()
    assert config is not None
    assert (config.triangle_layers(3), config.block_sparse_layers(3)) == ((2,), (0,))
    assert config.block_rule == RULE
