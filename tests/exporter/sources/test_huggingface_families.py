"""What families of transformers ask for beyond plain attention: followed, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import chunked_causal_mask_function
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.sources.huggingface import operator_in_torch as torch_attention
from trianglemix.exporter.sources.huggingface import worker as torch_worker
from trianglemix.exporter.sources.huggingface.compare_with_transformers import compute_reference
from trianglemix.exporter.sources.huggingface.operator_in_torch import classify_mask, refuse_unknown
from trianglemix.exporter.sources.huggingface.refusals import (
    refuse_moving_rope,
    rope_types_of_model,
)
from trianglemix.exporter.sources.huggingface.trace_graph import refuse_frozen_values, write_onnx

from tests.exporter.sources.huggingface_folders import (
    LENGTH,
    assert_right,
    export_here,
    open_model,
    run,
    save_random,
    source_logits,
)
from tests.tiny_models import tiny_folder


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"head_dim": 12}, "head_size is 12"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, "s_aux"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, "attention sinks of the softmax"),
        ("bloom", {"n_head": 4}, r"BloomForCausalLM adds a bias .*ALiBi"),
        ("gptj", {"n_head": 4, "rotary_dim": 4}, "make its ONNX file with another exporter"),
        ("mamba", {"state_size": 8}, "are linear_attention, which keeps a state of its own"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layer 0 of Lfm2ForCausalLM is conv"),
        ("mixtral", {"num_local_experts": 4}, "is a mixture of experts"),
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 8}, "chunks of 8 tokens"),
        ("roberta", {"is_decoder": True}, "does not count the positions"),
        ("doge", {}, r"computes with its attention mask \(dtype\)"),
        ("openai-gpt", {"n_layer": 2, "n_head": 4, "n_embd": 32}, "in code of their own, or none"),
    ],
)
def test_models_with_other_attention_are_refused(
    family: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_random(family, tmp_path / "folder", **config)
    with pytest.raises(TriangleMixError, match=message) as caught:
        export_here(folder, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_masks_of_another_class_are_refused() -> None:
    def blockwise(_b: Any, _h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i // 2 == j // 2)

    def of_tokens(_b: Any, _h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (torch.zeros(2)[j] == 0)

    for function in (blockwise, of_tokens):
        for window in (None, 4):
            mask = classify_mask(mask_function=function, local_size=window)
            assert mask.unknown == "an unknown mask"
            with pytest.raises(RefusedError, match="neither causal nor a sliding window"):
                refuse_unknown(0, torch.nn.Linear(1, 1), mask, {})
    chunked = classify_mask(
        mask_function=chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        local_size=4,
    )
    assert chunked.unknown == "chunked attention (chunks of 4 tokens)"


def test_masks_that_nothing_uses_are_let_through(tmp_path: Path) -> None:
    """A decoder taken out of an encoder-decoder model makes a mask for an encoder, too."""
    sizes = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40)
    assert_right(save_random("bart", tmp_path / "folder", **sizes), tmp_path / "work")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        # keys of 24, values of 16, latents in transformers' own cache
        ("deepseek_v3", dict(qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
            | dict(kv_lora_rank=12, q_lora_rank=20, first_k_dense_replace=2)
            | dict(num_key_value_heads=4)),
        # xIELU needs expm1
        ("apertus", dict(head_dim=8)),
        # layers that reuse keys and values, embeddings of each layer's own
        ("gemma3n_text", dict(head_dim=16, num_kv_shared_layers=2, num_hidden_layers=4)
            | dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8)
            | dict(vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, laurel_rank=8)
            | dict(activation_sparsity_pattern=[0.0] * 4, intermediate_size=[40] * 4)),
    ],
)  # fmt: skip
def test_what_families_need_beyond_plain_attention(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random(family, tmp_path / "folder", **config, pad_token_id=0)
    assert_right(folder, tmp_path / "work")


def test_a_moving_rotary_embedding_that_config_json_does_not_name_is_refused() -> None:
    """The class's own default, or a layer type's, decides what is loaded."""

    class Rotary(torch.nn.Module):
        rope_type: Any = None

    model = torch.nn.Sequential(Rotary(), Rotary())
    refuse_moving_rope(rope_types_of_model(model))
    model[1].rope_type = {"full_attention": "longrope", "sliding_attention": "default"}
    with pytest.raises(RefusedError, match="'longrope'"):
        refuse_moving_rope(rope_types_of_model(model))


def test_decisions_by_equal_shapes_are_followed_and_by_lengths_are_not() -> None:
    def equal(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        if x.shape[1] == y.shape[1]:
            return x
        return y

    def long(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 4096:
            return x + 1
        return x

    with refuse_frozen_values():
        torch.jit.trace(equal, torch.ones(2, 3))
    with pytest.raises(RefusedError, match="decides by its input"), refuse_frozen_values():
        torch.jit.trace(long, torch.ones(2, 3))


def test_values_that_tracing_would_freeze_are_refused() -> None:
    def decides(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if x.sum() > 0 else 3)

    with (
        pytest.raises(RefusedError, match=r"decides by its input at test_huggingface_families\.py"),
        refuse_frozen_values(),
    ):
        torch.jit.trace(decides, torch.ones(2))


@pytest.mark.parametrize("family", ["cohere", "glm"])
def test_interleaved_rotary_embeddings_keep_their_sizes_dynamic(
    family: str, tmp_path: Path
) -> None:
    """torch's own form of `repeat_interleave` crashes on the one and freezes sizes in the other."""
    folder = save_random(
        family, tmp_path / "folder", hidden_size=64, head_dim=16, pad_token_id=0, eos_token_id=1
    )
    model = open_model(folder, export_here(folder, tmp_path / "work"))
    ids = np.random.default_rng(3).integers(0, 61, (2, LENGTH))
    mask = np.ones_like(ids)
    expected = source_logits(folder, ids, mask)
    logits = run(model.session, ids, mask, [29, LENGTH])
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()


def test_a_traced_graph_with_a_frozen_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(g: Any, x: Any, *_: Any) -> Any:
        return g.op("Expand", x, g.op("Constant", value_t=torch.tensor([2, 3, 8])))

    monkeypatch.setattr(torch_attention, "_repeat_last_axis", frozen)
    folder = save_random(
        "glm", tmp_path / "folder", hidden_size=64, head_dim=16, pad_token_id=0, eos_token_id=1
    )
    with pytest.raises(RefusedError, match="the traced graph"):
        export_here(folder, tmp_path / "work")


def test_far_positions_are_checked_too() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), attn_implementation="eager")
    positions = compute_reference(model).positions
    assert positions[0].tolist() == list(range(13))
    assert positions.max() > 0.9 * model.config.max_position_embeddings


def test_a_scale_that_is_frozen_for_near_positions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that grows from position 1,000 on, lost by the graph as a frozen one would be."""
    traced = False
    rotary = LlamaRotaryEmbedding.forward

    def scaled(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = rotary(self, x, position_ids)
        if traced:
            return cos, sin
        far = (position_ids[..., None] >= 1000).to(cos.dtype)
        return cos * (1 + far), sin * (1 + far)

    def write(*arguments: Any) -> None:
        nonlocal traced
        traced = True
        write_onnx(*arguments)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", scaled)
    monkeypatch.setattr(torch_worker, "write_onnx", write)
    with pytest.raises(RefusedError, match="the traced graph gives logits that are off"):
        export_here(tiny_folder("llama"), tmp_path)
